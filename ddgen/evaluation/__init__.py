"""Students, protocols and distances: how good a distilled dataset and a generator are."""
