"""The HTML page of a run: what was distilled from what, how it looks, what it scores, how to make it again."""
