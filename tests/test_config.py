"""Settings: flags, YAML under flags, messages; nothing heavy before they are parsed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ddgen import cli
from ddgen.config import (
    EvaluateConfig,
    LabelConfig,
    SampleConfig,
    TrainConfig,
    TrainObserverConfig,
    from_flat_dict,
    parse,
    read_yaml,
    settings,
    to_flat_dict,
    write_yaml,
)
from ddgen.errors import UserError

ROOT = Path(__file__).parents[1]
KINDS = [TrainConfig, TrainObserverConfig, SampleConfig, LabelConfig, EvaluateConfig]


@pytest.mark.parametrize("kind", KINDS)
def test_yaml_gives_back_what_was_written(kind: type, tmp_path: Path) -> None:
    config = parse(kind, ["--seed", "7", "--mixed_precision", "no"], "x")
    write_yaml(tmp_path / "config.yaml", config)
    assert parse(kind, ["--config", str(tmp_path / "config.yaml")], "x") == config
    assert to_flat_dict(config)["mixed_precision"] == "no"


def test_flags_stand_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "learning_rate: 3e-4\nmixed_precision: no\nvae_channels: [16, 32]\nema_stds: [0.1]\nrandom_flip: false\n"
    )
    config = parse(TrainConfig, ["--config", str(path), "--learning_rate", "1e-3", "--skip_bad_images"], "x")
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.mixed_precision == "no"
    assert config.autoencoder.vae_channels == (16, 32)
    assert config.optimizer.ema_stds == (0.1,)
    assert config.data.random_flip is False and config.data.skip_bad_images is True
    assert config.optimizer.train_batch_size == TrainConfig().optimizer.train_batch_size


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], None), (["--random_flip"], True), (["--no_random_flip"], False), (["--random_flip", "False"], False),
        (["--no_random_flip", "--seed", "3"], False), (["--random_flip", "--seed", "3"], True),
    ],
)  # fmt: skip
def test_switches_with_a_derived_default_are_used_like_the_others(argv: list[str], expected: bool | None) -> None:
    assert parse(TrainConfig, argv, "x").data.random_flip is expected


def test_yaml_numbers_are_numbers_and_no_is_a_word(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 3e-4\nb: no\nc: 1_000\nd: 0.5\ne: true\nf: off\ng: 12\n")
    assert read_yaml(path) == {"a": 3e-4, "b": "no", "c": 1000, "d": 0.5, "e": True, "f": "off", "g": 12}


def test_every_setting_has_one_place_and_a_help_text() -> None:
    for kind in KINDS:
        flags = settings(kind)
        assert "seed" in flags and "mixed_precision" in flags
    train = settings(TrainConfig)
    for name in (
        "output_dir", "seed", "train_batch_size", "learning_rate", "max_train_steps", "gradient_accumulation_steps",
        "mixed_precision", "checkpointing_steps", "resume_from_checkpoint", "num_inference_steps", "guidance_scale",
        "report_to", "dry_run", "fid_every", "fid_num_images", "vae", "num_classes", "classes", "skip_bad_images",
    ):  # fmt: skip
        assert name in train


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learnig_rate", "1"], "--learnig_rate: unknown setting; did you mean learning_rate?"),
        (["--learning_rate", "fast"], "--learning_rate: could not convert string to float: 'fast'"),
        (["--max_train_steps", "1.5"], "--max_train_steps"),
        (["--learning_rate"], "'--learning_rate'"),
        (["--dataset", "cifar1"], "'cifar1'"),
        (["--preset", "xl"], "'xl'"),
        (["digits"], "digits"),
        (
            ["--config", "nowhere.yaml"],
            "--config nowhere.yaml: No such file or directory; give the path of a YAML file",
        ),
        (["--config"], "--config: give the path of a YAML file"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("train", argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("ddgen: ")
    assert expected in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learnin_rate: 1", "unknown setting learnin_rate; did you mean learning_rate?"),
        ("- a\n- b", "expected lines `setting: value`"),
        ("a: [1", "not YAML"),
        ("seed: 1\nseed: 2", "seed stands twice"),
        ("max_train_steps: many", "--max_train_steps"),
        ("preset: huge", "huge"),
    ],
)
def test_wrong_yaml_names_the_file(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse(TrainConfig, ["--config", str(path)], "x")
    assert expected in str(error.value) and "recipe.yaml" in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_states_its_command(path: Path) -> None:
    config = from_flat_dict(TrainConfig, read_yaml(path), path.name)
    assert config.data.dataset is not None
    header = path.read_text().splitlines()[0]
    assert header.startswith("# ")
    assert f"train_ldm.py --config configs/{path.name}" in path.read_text()
    assert set(yaml.safe_load(path.read_text())) <= set(settings(TrainConfig))


@pytest.mark.parametrize("script", ["train_ldm.py", "sample.py", "evaluate.py"])
def test_help_imports_nothing_heavy(script: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = [{script!r}, '--help']\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code in (0, None), stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'datasets', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--seed INT" in done.stdout


def test_the_list_of_commands_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.COMMANDS)
    assert cli.main(["distil"]) == 2
    assert f"distil: unknown command; one of {', '.join(cli.COMMANDS)}" in capsys.readouterr().err
