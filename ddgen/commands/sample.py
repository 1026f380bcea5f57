"""``sample``: a run in, a distilled dataset out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save

from ddgen.checkpoint import write_bytes
from ddgen.commands.candidates import PREVIEW_NAME, SamplingWork, cuda_wait
from ddgen.commands.distilled import (
    best_rejected,
    build_dataset,
    kept_line,
    label_kept,
    random_generated,
    rejected_line,
    selection_report,
    time_line,
)
from ddgen.commands.generators import candidate_source, check_probe, probe_classes
from ddgen.commands.history import made_with
from ddgen.commands.runs import (
    find_run,
    held_out_accuracy,
    load_on_all,
    observer_dir,
    random_generated_path,
    read_run_config,
    start_accelerator,
)
from ddgen.commands.teachers import check_teachers, load_teachers
from ddgen.config import SampleConfig
from ddgen.distill.pool import CandidateSource
from ddgen.distill.select import selection_needs
from ddgen.distill.selection_report import compared_classes
from ddgen.distill.streaming import RealScores, confusions, no_real_images
from ddgen.errors import Stopped, UserError
from ddgen.hardware import device_name, number_format
from ddgen.observer.inference import batch_size_of, for_inference
from ddgen.observer.observer import Observer
from ddgen.observer.realism import RealismScores, check_observer, real_class_scores, realism_scores
from ddgen.page.pictures import rejected_path, save_rejected
from ddgen.resume import on_main
from ddgen.stopping import stop_at_once
from ddgen.timing import Clock


def sample(config: SampleConfig) -> int:
    """Candidates, ranking, relabelling: writes a distilled dataset."""
    _check_settings(config)
    run_dir, chosen = find_run(config.run_dir, with_generator=config.generator is None)
    output_dir = Path(config.output_dir or run_dir / "distilled" / f"ipc{config.ipc}")
    if output_dir.exists() and not config.overwrite:
        raise UserError(f"--output_dir {output_dir}: exists already; give another, or --overwrite to replace it")
    with stop_at_once():
        accelerator, precision = start_accelerator(config.mixed_precision)
        try:
            accelerator.print(f"{'run':<12}{run_dir} ({chosen})")
            _sample(config, run_dir, output_dir, accelerator, precision)
        except Stopped as stopped:
            accelerator.print(str(stopped))
            accelerator.end_training()
            return 128 + stopped.signal_number
    return 0


def _check_settings(config: SampleConfig) -> None:
    if config.budget_seconds is not None and config.candidates_per_image is not None:
        raise UserError(
            f"--candidates_per_image {config.candidates_per_image}: --budget_seconds decides how many there are; give"
            " one of the two"
        )
    if config.ipc == 0 and config.budget_seconds is None:
        raise UserError("--ipc 0: keeps every candidate, so say with --budget_seconds how many there are to be")


def _sample(config: SampleConfig, run_dir: Path, output_dir: Path, accelerator: Accelerator, precision: str) -> None:
    say, device = accelerator.print, accelerator.device
    clock = Clock(cuda_wait(device))
    with clock("loading"):
        source = candidate_source(config, run_dir, accelerator, precision)
        observer = _observer(config, run_dir, source, accelerator, precision)
        work = SamplingWork(
            config=config,
            source=source,
            score=partial(
                realism_scores,
                for_inference(observer, device),
                batch_size=batch_size_of(device),
                device=device,
                precision=precision,
            ),
            real=_real_scores(config, run_dir, observer, accelerator, precision, clock),
            score_settings={"observer": observer.fingerprint, "precision": precision, "device": device.type},
            run_dir=run_dir,
            accelerator=accelerator,
            clock=clock,
        )
    for name, text in _first_lines(work, observer, output_dir, precision).items():
        say(f"{name:<12}{text}")
    if config.dry_run:
        say("dry run: the settings are fine; nothing was written")
        return
    with clock("loading"):
        teachers = load_teachers(
            config.observer or [observer_dir(run_dir)], source.class_names, config.teacher_epoch,
            ipc=config.ipc, data=read_run_config(run_dir).data, accelerator=accelerator, precision=precision,
        )  # fmt: skip
        check_teachers(teachers, read_run_config(run_dir).data, accelerator, precision)
    work.open()
    say(_already_there(work))
    classes, count = probe_classes(len(source.class_names), config.num_candidates)
    work.probe(
        classes, count, lambda pixels, labels: check_probe(config, work.score(pixels, labels), labels, observer, say)
    )
    counts = work.run()
    on_main(accelerator, lambda: _finish(work, counts, observer, teachers, output_dir, precision))
    accelerator.wait_for_everyone()


def _observer(
    config: SampleConfig, run_dir: Path, source: CandidateSource, accelerator: Accelerator, precision: str
) -> Observer:
    path = config.observer[0] if config.observer else observer_dir(run_dir)
    observer = Observer.load(path, source.class_names)
    if observer.accuracy is None:
        observer.accuracy = held_out_accuracy(observer, read_run_config(run_dir).data, accelerator, precision)
    check_observer(observer, source.class_names)
    return observer.to(accelerator.device)


def _real_scores(
    config: SampleConfig, run_dir: Path, observer: Observer, accelerator: Accelerator, precision: str, clock: Clock
) -> RealScores:
    """Returns what scores the real images of the classes that the rule or its report looks at.

    Raises:
        UserError: The rule needs real images, and the run's are not there.
    """
    data = read_run_config(run_dir).data
    try:
        dataset = load_on_all(accelerator, data, "train")
    except UserError as error:
        if selection_needs(config.rule).real:
            raise UserError(
                f"--selection {config.rule}: compares candidates with the run's real images, which cannot be read"
                f" ({error}); bring them back, or take --selection realism"
            ) from None
        accelerator.print(f"{'coverage':<12}not measured, without the real images: {error}")
        return no_real_images
    compared = set(compared_classes(config.rule, dataset.num_classes))
    fused_on = accelerator.device
    fused = for_inference(observer, fused_on)

    def scores(label: int) -> RealismScores | None:
        if label not in compared:
            return None
        with clock("real images"):
            return real_class_scores(fused, dataset, label, config.seed, device=fused_on, precision=precision)

    return scores


def _first_lines(work: SamplingWork, observer: Observer, output_dir: Path, precision: str) -> dict[str, str]:
    """Returns what is about to happen, one fact a line."""
    source, device, processes = work.source, work.accelerator.device, work.accelerator.num_processes
    one = "1 process" if processes == 1 else f"{processes} processes"
    return {
        "device": f"{device_name(device)}, {number_format(device, precision)}, {one}",
        "images": f"{len(source.class_names):,} classes, {source.image_size} px",
        **source.describe(),
        "observer": f"{observer.network}, {observer.accuracy:.1%} on held-out real images",
        "candidates": _how_many(work.config, len(source.class_names)),
        "latest ones": f"{work.pool_dir / PREVIEW_NAME}, while they are made",
        "output": str(output_dir),
    }


def _how_many(config: SampleConfig, num_classes: int) -> str:
    count = config.num_candidates
    if count is None:
        kept = f"{config.ipc:,} kept of each class" if config.ipc else "all kept"
        return f"as many as {config.budget_seconds:,.0f} s allow, {kept}"
    return f"{count * num_classes:,}: {config.ipc:,} of {count:,} kept in each class"


def _already_there(work: SamplingWork) -> str:
    stored = work.pool.num_stored()
    text = f"{'pool':<12}{work.pool_dir}"
    return text + (f", {stored:,} candidates are there already" if stored else "")


def _finish(
    work: SamplingWork,
    counts: list[int],
    observer: Observer,
    teachers: Sequence[Observer],
    output_dir: Path,
    precision: str,
) -> None:
    """Writes the distilled dataset and says what it is."""
    say, config, names = work.accelerator.print, work.config, work.source.class_names
    classes = work.gather(counts)
    facts: dict[str, Any] = {
        "run_dir": work.run_dir, "observer": observer, "teachers": teachers, "precision": precision,
        "machine": made_with(work.accelerator, precision), "num_made": work.num_made,
    }  # fmt: skip
    with work.clock("relabelling"):
        soft = label_kept(config, classes, observer, teachers, work.accelerator.device, precision)
    dataset = build_dataset(config, work.source, classes, soft, seconds=dict(work.clock.seconds), **facts)
    with work.clock("writing"):
        report = selection_report(config, work.source, classes)
        dataset.save(output_dir, overwrite=config.overwrite, selection_png=report.draw(), progress=True)
        baseline = random_generated(classes, dataset.labels)
        write_bytes(random_generated_path(work.run_dir, output_dir), save(baseline))
        save_rejected(rejected_path(work.run_dir, output_dir), *best_rejected(classes))
    left = work.finish(counts)
    if min(counts) < config.ipc:
        say(f"{min(counts):,} candidates of a class are fewer than --ipc {config.ipc}: all are kept")
    say(kept_line(dataset))
    say("\n".join(report.lines()))
    say(rejected_line(config, classes))
    for label, other, part in confusions(classes):
        say(f"{part:.0%} of the candidates of {names[label]!r} are {names[other]!r} to the observer: check the classes")
    made = {"sampling": work.num_made, "decoding": work.num_made, "ranking": work.num_ranked}
    made |= dict.fromkeys(("relabelling", "writing"), len(dataset))
    say(time_line(work.clock, made, work.accelerator.num_processes))
    if left:
        say(f"candidates:        {left}")
    say(f"distilled dataset: {output_dir}")
    say(f"preview:           {output_dir / 'preview.png'}")
    say(f"selection:         {output_dir / 'selection.png'}")
    say("next:              python evaluate.py")
