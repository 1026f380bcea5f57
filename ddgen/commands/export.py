"""``export``: a distilled dataset in the formats of others."""

from __future__ import annotations

from pathlib import Path

from ddgen.config import ExportConfig
from ddgen.distill.dataset import DistilledDataset
from ddgen.distill.exports import export_challenge, export_dd_ranking
from ddgen.errors import UserError


def export(config: ExportConfig) -> int:
    """Writes a distilled dataset as a challenge's file or as DD-Ranking's folder."""
    if config.distilled_dir is None:
        raise UserError("--distilled_dir: not set; give a folder that sample.py wrote")
    if config.format is None:
        raise UserError("--format: not set; challenge or dd-ranking")
    source = Path(config.distilled_dir)
    dataset = DistilledDataset.load(source)
    beside = source.resolve().with_name(f"{source.resolve().name}-{config.format}")
    if config.format == "challenge":
        path = Path(config.output or beside / f"{dataset.provenance.get('dataset')}.pt")
        export_challenge(dataset, path, overwrite=config.overwrite)
    else:
        path = Path(config.output or beside)
        export_dd_ranking(dataset, path, overwrite=config.overwrite)
    print(f"exported {len(dataset):,} images of {len(dataset.class_names):,} classes: {path}")
    return 0
