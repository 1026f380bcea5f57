"""From generated candidates to a distilled dataset: pool, selection, relabelling, the folder that is shared."""
