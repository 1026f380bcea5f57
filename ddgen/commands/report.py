"""``report``: the page of a run."""

from __future__ import annotations

from pathlib import Path

from ddgen.commands.runs import find_run
from ddgen.config import ReportConfig
from ddgen.errors import UserError
from ddgen.page.page import write_page
from ddgen.page.run import is_run


def report(config: ReportConfig) -> int:
    """Writes the page from what lies in the run folder."""
    if config.run_dir is None:
        run_dir, chosen = find_run(None)
        print(f"run: {run_dir} ({chosen})")
    else:
        run_dir = Path(config.run_dir)
    if not is_run(run_dir):
        raise UserError(f"--run_dir {run_dir}: nothing of a run in it; give a folder that train_ldm.py wrote")
    page = Path(config.output or run_dir / "report.html")
    if page.is_dir():
        raise UserError(f"--output {page}: a folder; give the name of the page, for instance {page}/report.html")
    print(f"report: {write_page(run_dir, page)}")
    return 0
