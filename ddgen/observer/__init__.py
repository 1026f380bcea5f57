"""The classifier that ranks and relabels: networks, training, realism."""
