"""Generators that ddgen did not train: tiny pipelines on disk, loaded the way a user's are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from foreign_cases import (
    colour_folder,
    consistency_folder,
    dit_folder,
    stable_diffusion_3_folder,
    stable_diffusion_folder,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import sample
from ddgen import cli
from ddgen.autoencoder.autoencoder import identity
from ddgen.commands.generators import check_probe, probe_classes
from ddgen.config import DenoiserConfig, GuidanceConfig, SampleConfig
from ddgen.diffusion.class_map import label_numbers, prompts, read_class_map, words_of
from ddgen.diffusion.foreign import ForeignGenerator, load_foreign, square_pixels
from ddgen.diffusion.foreign_files import find_pipeline
from ddgen.diffusion.generator import Generator, save_generator
from ddgen.diffusion.unet import build_unet
from ddgen.distill.dataset import DistilledDataset
from ddgen.errors import UserError
from ddgen.observer.observer import Observer
from ddgen.observer.realism import candidate_problem, realism_scores
from ddgen.seeds import torch_generator

CPU = torch.device("cpu")
ANIMALS = ("tabby", "goldfish", "bald_eagle")
IMAGENET = {**{i: f"thing {i}" for i in range(1000)}, 1: "goldfish, Carassius auratus", 22: "bald eagle", 281: "Tabby"}
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.1, 0.9), "white": (0.9, 0.9, 0.9)}


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code that pipelines bring goes into a folder of the test's own."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pipeline of each kind; tests only read them."""
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "dit": dit_folder(root / "dit", id2label=IMAGENET),
        "dit10": dit_folder(root / "dit10", 10, {i: name for i, name in enumerate(ANIMALS)}),
        "sd": stable_diffusion_folder(root / "sd"),
        "sd3": stable_diffusion_3_folder(root / "sd3"),
        "consistency": consistency_folder(root / "consistency"),
    }


def load(folder: Path, class_names: tuple[str, ...] = ANIMALS, **settings: Any) -> ForeignGenerator:
    trust = settings.get("trust_remote_code", False)
    files = find_pipeline(str(folder), trust_remote_code=trust)
    return load_foreign(files, class_names, settings.pop("image_size", 8), CPU, "no", **settings)


def numbered(path: Path) -> str:
    path.write_text("".join(f"{name}: {number}\n" for number, name in enumerate(ANIMALS)))
    return str(path)


# --- every kind of pipeline


@pytest.mark.parametrize("kind", ["dit", "dit10", "sd", "sd3", "consistency"])
def test_an_image_depends_on_seed_class_and_index_only(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    class_map = numbered(tmp_path / "map.txt") if kind == "consistency" else None
    generator = load(folders[kind], num_inference_steps=2, class_map_path=class_map)
    labels, indices = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 0, 5, 1])
    together = generator.sample(labels, indices, seed=3)
    assert together.shape == (4, 3, 8, 8) and together.dtype == torch.uint8
    alone = torch.cat([generator.sample(labels[i : i + 1], indices[i : i + 1], seed=3) for i in (3, 2, 1, 0)]).flip(0)
    assert (together.int() - alone.int()).abs().max() <= 1
    assert (generator.sample(labels, indices, seed=4).int() - together.int()).abs().float().mean() > 1
    same_noise = load(folders[kind], num_inference_steps=2, class_map_path=class_map)
    object.__setattr__(same_noise, "conditions", (generator.conditions[1], *generator.conditions[1:]))
    assert not torch.equal(same_noise.sample(labels, indices, seed=3)[0], together[0])  # the class has its say
    json.dumps(generator.settings())
    assert all(isinstance(value, str) for value in generator.describe().values())


def test_labels_are_found_by_name_and_prompts_are_written(folders: dict[str, Path]) -> None:
    assert load(folders["dit"]).conditions == (281, 1, 22)
    assert load(folders["dit10"]).conditions == (0, 1, 2)
    generator = load(folders["sd"], prompt="a {class}, a {class}!")
    assert generator.conditions == ("a tabby, a tabby!", "a goldfish, a goldfish!", "a bald eagle, a bald eagle!")
    assert load(folders["sd3"]).conditions[2] == "a photo of a bald eagle"
    assert generator.describe()["prompt"] == "a {class}, a {class}!"
    assert generator.describe()["class map"] == "tabby: tabby; goldfish: goldfish; bald_eagle: bald eagle"


def test_the_first_image_is_the_one_diffusers_makes(folders: dict[str, Path]) -> None:
    generator = load(folders["dit"], image_size=16, num_inference_steps=3, guidance_scale=2.0)
    pipeline = diffusers.DiTPipeline.from_pretrained(folders["dit"])
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1], guidance_scale=2.0, num_inference_steps=3, output_type="np",
                      generator=[torch_generator(5, "sample", 1, 7)]).images  # fmt: skip
    ours = generator.sample(torch.tensor([1]), torch.tensor([7]), 5)[0].permute(1, 2, 0)
    assert np.abs(ours.numpy() - 255 * images[0]).max() <= 0.5 + 1e-3


def test_a_dit_of_other_classes_is_guided_by_its_own_null_class(folders: dict[str, Path]) -> None:
    """By hand: the unconditional branch is class 10 of 10, where diffusers would ask for class 1000."""
    generator = load(folders["dit10"], image_size=16, num_inference_steps=2, guidance_scale=3.0)
    pipeline = generator.pipeline
    latents = torch.randn(1, 4, 8, 8, generator=torch_generator(0, "sample", 1, 0))
    pipeline.scheduler.set_timesteps(2)
    plain = diffusers.DiTPipeline.from_pretrained(folders["dit10"]).transformer
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            both = plain(latents.repeat(2, 1, 1, 1), t.expand(2), torch.tensor([1, 10])).sample[:, :4]
            guided = both[1:] + 3.0 * (both[:1] - both[1:])
            latents = pipeline.scheduler.step(guided, t, latents).prev_sample
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    ours = generator.sample(torch.tensor([1]), torch.tensor([0]), 0)
    assert (ours.float() - 255 * image.clamp(0, 1)).abs().max() <= 0.5 + 1e-2


def test_weights_are_in_the_precision_asked_for(folders: dict[str, Path]) -> None:
    files = find_pipeline(str(folders["dit10"]), trust_remote_code=False)
    generator = load_foreign(files, ANIMALS, 8, CPU, "bf16", num_inference_steps=2)
    assert generator.pipeline.transformer.dtype == generator.pipeline.vae.dtype == torch.bfloat16
    assert generator.sample(torch.tensor([0]), torch.tensor([0]), 0).float().std() > 1


def test_images_are_cut_square_and_resized() -> None:
    images = torch.zeros(1, 3, 4, 8)
    images[:, 0, :, 2:6] = 1.0  # the middle square
    images[:, 1, :2] = 0.6
    images[:, 2] = 1.7
    pixels = square_pixels(images, 2)
    assert pixels[0, 0].tolist() == [[255, 255], [255, 255]]
    # antialiased, bilinear by a factor 2: weights 3/7 3/7 1/7 at the border
    assert pixels[0, 1, :, 0].tolist() == [round(255 * 0.6 * 6 / 7), round(255 * 0.6 * 1 / 7)]
    assert (pixels[0, 2] == 255).all()


# --- samplers and settings


def with_scheduler(folder: Path, name: str, **settings: Any) -> Path:
    config = {"_class_name": name, "beta_end": 0.013, **settings}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    edit_index(folder, scheduler=["diffusers", name])
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_a_sampler_takes_the_schedulers_place(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["dit10"], tmp_path / "dit"))
    one = (torch.tensor([0]), torch.tensor([0]), 0)
    with pytest.raises(UserError, match=r"with DDPMScheduler it draws noise of its own.*--sampler ddim"):
        load(with_scheduler(folder, "DDPMScheduler"), num_inference_steps=2).sample(*one)
    with_scheduler(folder, "DPMSolverMultistepScheduler", variance_type="learned_range")
    for sampler, kind in (("ddim", "DDIMScheduler"), ("dpmsolver++", "DPMSolverMultistepScheduler"),
                          ("unipc", "UniPCMultistepScheduler")):  # fmt: skip
        generator = load(folder, num_inference_steps=4, sampler=sampler)
        assert type(generator.pipeline.scheduler).__name__ == kind == generator.settings()["sampler"]
        config = generator.pipeline.scheduler.config
        assert config.beta_end == 0.013 and not config.get("clip_sample", False)
        assert generator.sample(*one).shape == (1, 3, 8, 8)


def test_settings_that_cannot_be_honoured_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sampler ddim: the FlowMatchEulerDiscreteScheduler of .*sd3 cannot"):
        load(folders["sd3"], sampler="ddim")
    with pytest.raises(UserError, match=r"--sampler heun: the DDIMScheduler of .*dit cannot be exchanged for it"):
        load(folders["dit"], sampler="heun")
    class_map = numbered(tmp_path / "map.txt")
    with pytest.raises(UserError, match=r"--guidance_scale 2.0: ConsistencyModelPipeline .* has no such setting"):
        load(folders["consistency"], class_map_path=class_map, guidance_scale=2.0)
    with pytest.raises(UserError, match=r"--prompt 'a {class}': .*dit takes class labels"):
        load(folders["dit"], prompt="a {class}")


# --- class maps

LABELS = {0: "tench, Tinca tinca", 1: "crane", 2: "Crane", 3: "golden retriever", 4: "cardigan, Welsh corgi"}


@pytest.mark.parametrize(
    ("class_names", "class_map", "expected"),
    [
        (("Golden_Retriever", "Tinca tinca"), {}, [3, 0]),
        (("tench, Tinca tinca", "cardigan"), {}, [0, 4]),
        (("a", "b"), {"a": "2", "b": "golden retriever"}, [2, 3]),
        (("tench", "crane"), {"crane": "1"}, [0, 1]),
        (("tench", "crane"), {}, "class 'crane' may be its label 1 (crane) or 2 (Crane)"),
        (("tench", "golden retriver"), {}, "'golden retriver'; did you mean golden retriever?"),
        (("tench", "b"), {"b": "5"}, "class 'b' is label 5; G has 0 to 4"),
        (("tench", "b"), {"b": "-1"}, "class 'b' is label -1; G has 0 to 4"),
        (("tench", "b"), {"b": "corgy"}, "class 'b': no label 'corgy' in G"),
        (("tench", "b"), {"b": "0"}, "classes 'tench' and 'b' have the same label of G, '0'"),
        (("n01440764", "n02018795"), {}, "'n01440764' and 1 more of 2 is a WordNet id"),
    ],
)
def test_labels_of_classes(class_names: tuple[str, ...], class_map: dict[str, str], expected: list[int] | str) -> None:
    def find() -> list[int]:
        return label_numbers(class_names, LABELS, 5, class_map, generator="G", class_map_path="map.txt")

    if isinstance(expected, list):
        assert find() == expected
        return
    with pytest.raises(UserError) as caught:
        find()
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_labels_without_names_need_a_map() -> None:
    with pytest.raises(UserError, match=r"its 3 labels have no names; say with --class_map FILE .* `cat: 0`"):
        label_numbers(("cat", "dog"), {}, 3, {}, generator="G", class_map_path=None)
    numbers = {"cat": "7", "dog": "2"}
    assert label_numbers(("cat", "dog"), {}, None, numbers, generator="G", class_map_path="m") == [7, 2]


def test_the_classes_of_imagenet_are_the_labels_of_its_models() -> None:
    ids = ["n01440764", *(f"n{i:08d}" for i in range(1500000, 1500998)), "n15075141"]
    words = {i: f"thing {i}" for i in range(1000)}
    assert label_numbers(ids, words, 1000, {}, generator="G", class_map_path=None) == list(range(1000))
    for others in (ids[::-1], [*ids[:-1], "n15075142"]):
        with pytest.raises(UserError, match=r"and 999 more of 1000 is a WordNet id"):
            label_numbers(others, words, 1000, {}, generator="G", class_map_path=None)


def test_words_of_classes() -> None:
    names = ("n01440764", "great_white_shark, Carcharodon", "no")
    class_map = {"n01440764": "tench, Tinca tinca", "no": "sign, forbidding"}
    assert words_of(names, class_map, class_map_path="m") == ["tench", "great white shark", "sign, forbidding"]
    assert prompts("a {class}", ["tench"]) == ["a tench"]
    with pytest.raises(UserError, match="--class_map: not set, but class 'n01440764', a WordNet id"):
        words_of(names, {}, class_map_path=None)
    with pytest.raises(UserError, match="--class_map m: no line for class 'n01440764'"):
        words_of(names, {"no": "yes"}, class_map_path="m")
    with pytest.raises(UserError, match="classes 'a' and 'b' have the same words, 'x'"):
        words_of(("a", "b"), {"a": "x", "b": "x"}, class_map_path="m")
    with pytest.raises(UserError, match=r"--prompt 'a cat': holds no \{class\}"):
        prompts("a cat", ["tench"])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("m.json", '{"no": "tench", "a: b": 3}', {"no": "tench", "a: b": "3"}),
        ("m.yaml", "no: tench\n'a: b': 3\n", {"no": "tench", "a: b": "3"}),
        ("m.txt", "# words\nno: tench\n\na: b: 3\n", {"no": "tench", "a: b": "3"}),
        ("words.txt", "n01440764\ttench, Tinca\nno : yes: 1\n", {"n01440764": "tench, Tinca", "no": "yes: 1"}),
        ("list", "n00000001 no\nn01440764 tench, Tinca tinca\n", {"n01440764": "tench, Tinca tinca"}),
        ("m.json", '{"no": 1, "no": 2}', "class 'no' stands 2 times"),
        ("m.yaml", "no: 1\nno: 2\n", "class 'no' stands 2 times"),
        ("m.json", "[1, 2]", "expected one value for each class"),
        ("m.yaml", "no: [1, 2]\n", "expected one value for each class"),
        ("m.json", "{", "not JSON"),
        ("m.yaml", "a: b: c", "not YAML"),
        ("m.txt", "no tench\n", "line 'no tench': expected `class: value`"),
        ("m.txt", "nope: 1\n", "no class 'nope' in the dataset; did you mean no?"),
        ("m.txt", "\n", "empty"),
    ],
)  # fmt: skip
def test_class_maps_are_read(tmp_path: Path, name: str, text: str, expected: dict[str, str] | str) -> None:
    (tmp_path / name).write_text(text)
    classes = ("no", "a: b", "n01440764")
    if isinstance(expected, dict):
        assert read_class_map(str(tmp_path / name), classes) == expected
        return
    with pytest.raises(UserError, match=f"--class_map .*{name}: ") as caught:
        read_class_map(str(tmp_path / name), classes)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_no_class_map_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        read_class_map(str(tmp_path / "none.json"), ("a",))


# --- what cannot be loaded


def pickle_instead(folder: Path, name: str, pickled: str) -> None:
    (weights,) = (folder / name).glob("*.safetensors")
    torch.save(load_file(weights), folder / name / pickled)
    weights.unlink()


def edit_index(folder: Path, **entries: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text()) | entries
    (folder / "model_index.json").write_text(json.dumps(index))


def drop_tensor(folder: Path, name: str) -> None:
    (weights,) = (folder / name).glob("*.safetensors")
    tensors = load_file(weights)
    del tensors[min(tensors)]
    save_file(tensors, weights, metadata={"format": "pt"})


def cut_short(folder: Path, name: str) -> None:
    (weights,) = (folder / name).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:3000])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled unet": (
        lambda f: pickle_instead(f, "unet", "diffusion_pytorch_model.bin"),
        r"unet has pickled weights only \(diffusion_pytorch_model.bin\).*save_pretrained\(\) writes safetensors",
    ),
    "pickled text encoder": (
        lambda f: pickle_instead(f, "text_encoder", "pytorch_model.bin"),
        r"text_encoder has pickled weights only \(pytorch_model.bin\)",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"tokenizer has no vocabulary \(CLIPTokenizer\)"),
    "no vocabulary": (
        lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()],
        r"tokenizer has no vocabulary \(CLIPTokenizer\); copy the folder tokenizer again",
    ),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "diffusers cannot load it: .*config.json"),
    "no weights": (
        lambda f: next((f / "unet").glob("*.safetensors")).unlink(),
        "no file named diffusion_pytorch_model",
    ),
    "cut short": (lambda f: cut_short(f, "unet"), "diffusers cannot load it: Unable to load weights"),
    "text encoder cut short": (
        lambda f: cut_short(f, "text_encoder"),
        r"a .safetensors file is damaged .*copy it again",
    ),
    "tensor missing": (lambda f: drop_tensor(f, "unet"), "weights are missing from its files"),
    "text encoder's tensor missing": (lambda f: drop_tensor(f, "text_encoder"), "weights are missing from its files"),
    "unknown class": (lambda f: edit_index(f, _class_name="NewPipeline"), r"diffusers [\d.]+ has no NewPipeline"),
    "no JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not JSON"),
    "another JSON": (lambda f: (f / "model_index.json").write_text("[]"), "names no pipeline class"),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"no diffusers pipeline \(model_index.json is missing\)"),
    "image to image": (lambda f: edit_index(f, _class_name="StableDiffusionImg2ImgPipeline"), "also needs image"),
    "inpainting": (lambda f: edit_index(f, _class_name="StableDiffusionInpaintPipeline"), "also needs image"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # some of these pipelines are on their way out of diffusers
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_what_cannot_be_loaded_is_told_in_one_line(folders: dict[str, Path], tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "sd"))
    spoil, expected = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(UserError, match=expected) as caught:
        load(folder)
    assert str(caught.value).startswith(f"--generator {folder}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("./nothing", "no such folder"),
        ("a/b/c", "no such folder"),
        ("not allowed!", "neither a folder nor a hub id"),
        (
            "somebody/some-model",
            "not on this machine, and the hub cannot be reached or is switched off by HF_HUB_OFFLINE",
        ),
    ],
)
def test_what_is_not_there(source: str, expected: str) -> None:
    with pytest.raises(UserError, match=f"--generator {source}: {expected}"):
        find_pipeline(source, trust_remote_code=False)


def test_a_model_of_the_hub_in_the_cache(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--somebody--dit"
    shutil.copytree(folders["dit10"], model / "snapshots" / ("0" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    files = find_pipeline("somebody/dit", trust_remote_code=False)
    generator = load_foreign(files, ANIMALS, 8, CPU, "no", num_inference_steps=2)
    assert generator.sample(torch.tensor([0]), torch.tensor([0]), 0).shape == (1, 3, 8, 8)
    assert generator.fingerprint() == load(folders["dit10"]).fingerprint()


def test_code_is_run_only_when_the_user_says_so(tmp_path: Path) -> None:
    folder = colour_folder(tmp_path / "colours", COLOURS)
    with pytest.raises(UserError, match=r"brings code of its own; read .*pipeline.py, then --trust_remote_code"):
        load(folder, tuple(COLOURS))
    assert load(folder, tuple(COLOURS), trust_remote_code=True).conditions == (0, 1, 2, 3)
    folder = dit_folder(tmp_path / "dit", 3)
    (folder / "transformer" / "net.py").write_text("from diffusers import DiTTransformer2DModel as Net\n")
    edit_index(folder, transformer=["net", "Net"])
    with pytest.raises(UserError, match=r"brings code of its own; read .*net.py"):
        load(folder)


def test_the_fingerprint_is_of_what_decides_the_images(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["dit10"], tmp_path / "dit"))
    first = load(folder).fingerprint()
    assert first == load(folders["dit10"]).fingerprint()
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A card\n")
    generator = load(folder)
    assert generator.fingerprint() == first and generator.describe()["generator's licence"] == "cc-by-nc-4.0"
    assert load(folders["dit10"]).describe()["generator's licence"] == "see its page"
    (weights,) = (folder / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] += 1e-6
    save_file(tensors, weights, metadata={"format": "pt"})
    assert load(folder).fingerprint() != first


# --- images that will not do


def colours(tmp_path: Path, **settings: Any) -> ForeignGenerator:
    return load(colour_folder(tmp_path / "colours", COLOURS, **settings), tuple(COLOURS), trust_remote_code=True)


def test_images_that_the_safety_checker_blackens_are_drawn_anew(tmp_path: Path) -> None:
    generator = colours(tmp_path, fault="prudish")
    labels, indices = torch.arange(4).repeat_interleave(8), torch.arange(8).repeat(4)
    pixels = generator.sample(labels, indices, 0)
    expected = 255 * torch.tensor(list(COLOURS.values()))[labels]
    assert (pixels.float().mean((2, 3)) - expected).abs().max() < 25  # none is black
    assert 8 <= generator.rejected["safety checker"] <= 100  # half of them at every attempt
    assert torch.equal(generator.sample(labels[5:6], indices[5:6], 0)[0], pixels[5])


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("prude", "its safety checker refused class 'red' 21 times in a row"),
        ("own noise", "it draws noise of its own"),
        ("nan", "images that are not finite in no"),
        ("grey", r"ColourPipeline gives float32 \(1, 16, 16, 1\), where 1 RGB images were asked for"),
    ],
)
def test_images_that_will_not_do(tmp_path: Path, fault: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        colours(tmp_path, fault=fault).sample(torch.tensor([0]), torch.tensor([0]), 0)


def test_what_fails_inside_a_pipeline_is_told(folders: dict[str, Path]) -> None:
    generator = load(folders["sd"], num_inference_steps=2)
    object.__setattr__(generator, "arguments", {"guidance_scale": "much"})
    with pytest.raises(UserError, match=r"sd: the pipeline fails \(TypeError: "):
        generator.sample(torch.tensor([0]), torch.tensor([0]), 0)


# --- the observer looks at the first candidates


def test_the_first_candidates_are_spread_over_the_classes() -> None:
    assert probe_classes(10, 40) == (list(range(10)), 7)
    assert probe_classes(10, 4) == (list(range(10)), 4)
    classes, count = probe_classes(200, 40)
    assert (len(set(classes)), count, classes[0], classes[-1]) == (64, 1, 0, 196)
    assert probe_classes(2, 100) == ([0, 1], 32)


def test_chance_is_told_from_recognition() -> None:
    names = [f"c{i}" for i in range(10)]
    labels = torch.arange(10).repeat_interleave(7)

    def verdict(hits: int) -> str | None:
        predicted = (labels + 1) % 10
        predicted[:hits] = labels[:hits]
        return candidate_problem(predicted, labels, names)

    assert verdict(13) is not None and verdict(14) is None  # 20 % of 70, and P(X >= 14 | 70, 0.1) = 0.008
    problem = verdict(7)
    assert problem is not None
    assert "7 of the first 70 images (10.0%; chance is 10.0%)" in problem and "'c1' seen as 'c2' (7 of 7)" in problem
    # two classes: 62.5 % of 64 are 40, but P(X >= 41 | 64, 0.5) = 0.016
    two = torch.arange(2).repeat_interleave(32)
    flip = lambda hits: torch.where(torch.arange(64) < hits, two, 1 - two)  # noqa: E731
    assert (
        candidate_problem(flip(41), two, ["a", "b"]) is not None
        and candidate_problem(flip(42), two, ["a", "b"]) is None
    )
    # one lucky image of 64 is no sign of anything when there are 200 classes
    many = torch.arange(64)
    lucky = torch.where(many < 1, many, many + 100)
    assert candidate_problem(lucky, many, [str(i) for i in range(200)]) is not None


# --- the command


@pytest.fixture(scope="module")
def observer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ddgen observer` leaves for a folder of coloured images."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for name, colour in COLOURS.items():
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = 255 * np.array(colour) + rng.normal(0, 20, (16, 16, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "data" / split / name / f"{i}.png")
    options = ["--dataset", "imagefolder", "--data_dir", str(root / "data"), "--image_size", "16"]
    options += ["--observer_network", "convnet2", "--observer_epochs", "6", "--observer_batch_size", "16"]
    assert cli.main(["observer", *options, "--mixed_precision", "no", "--output_dir", str(root / "observer")]) == 0
    return root / "observer"


def own_run(observer_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(observer_run, tmp_path / "run"))


def test_an_observer_and_anybodys_generator_make_a_distilled_dataset(
    observer_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels of the pipeline are in another order than the classes; names bring them together."""
    run = own_run(observer_run, tmp_path)
    palette = {name.upper(): COLOURS[name] for name in ("white", "green", "red", "blue")}
    folder = colour_folder(tmp_path / "pipeline", palette, size=[24, 32])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    args = ["--run_dir", str(run), "--generator", str(folder), "--trust_remote_code", "--ipc", "2"]
    assert sample.main([*args, "--mixed_precision", "no"]) == 0
    assert "kept 8 of 32 candidates" in capsys.readouterr().out
    distilled = DistilledDataset.load(run / "distilled" / "ipc2")
    assert distilled.class_names == ("blue", "green", "red", "white")
    expected = 255 * torch.tensor([COLOURS[name] for name in distilled.class_names])[distilled.labels]
    assert (distilled.pixels.float().mean((2, 3)) - expected).abs().max() < 25
    card = (run / "distilled" / "ipc2" / "README.md").read_text()
    assert "`blue`: `3`, `green`: `1`, `red`: `2`, `white`: `0`" in card and f"{folder} (ColourPipeline)" in card
    assert "whose licence is: mit" in card and "A latent diffusion model trained on the real images" not in card
    options = ["--epochs", "1", "--repeats", "1", "--protocols", "hard", "--mixed_precision", "no"]
    assert evaluate.main(["--distilled_dir", str(run / "distilled" / "ipc2"), *options]) == 0
    assert "random generated" in capsys.readouterr().out
    assert evaluate.main(["--run_dir", str(run), "--dry_run", "--overwrite", "--mixed_precision", "no"]) == 0
    assert f"on {run / 'distilled' / 'ipc2'}" in capsys.readouterr().out


def test_a_weak_generator_of_the_runs_own_is_only_warned_of(observer_run: Path) -> None:
    pixels = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, observer = torch.arange(4).repeat_interleave(16), Observer.load(observer_run)
    scores = realism_scores(observer, pixels.repeat(4, 1, 1, 1), labels, batch_size=64, device=CPU, precision="no")
    lines: list[str] = []
    look = partial(check_probe, scores=scores, labels=labels, observer=observer)
    look(SampleConfig(), say=lines.append)
    assert len(lines) == 1 and lines[0].startswith("warning: the observer names the class of 16 of the first 64 images")
    with pytest.raises(UserError, match=r"--generator X: the observer names the class of 16 of the first 64 images"):
        look(SampleConfig(generator="X"), say=lines.append)


def test_a_wrong_class_map_is_refused_before_the_pool_is_made(
    observer_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = own_run(observer_run, tmp_path)
    folder = colour_folder(tmp_path / "pipeline", COLOURS)
    (tmp_path / "map.txt").write_text("red: green\ngreen: red\nblue: 3\nwhite: 2\n")
    args = ["--run_dir", str(run), "--generator", str(folder), "--trust_remote_code", "--mixed_precision", "no"]
    assert sample.main([*args, "--ipc", "8", "--class_map", str(tmp_path / "map.txt")]) == 2
    error = capsys.readouterr().err
    assert f"--generator {folder}: the observer names the class of 0 of the first 64 images" in error
    assert "'red' seen as 'green' (16 of 16)" in error and "check --class_map" in error
    assert not (run / "distilled").exists()
    made = [path for path in (run / "pool").rglob("*.safetensors")]
    assert sum(len(load_file(path)["index"]) for path in made) == 64  # of 128
    (tmp_path / "map.txt").write_text("red: 0\ngreen: 1\nblue: 2\nwhite: 3\n")
    assert sample.main([*args, "--ipc", "8", "--class_map", str(tmp_path / "map.txt")]) == 0


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--guidance_interval", "0.2", "0.8"], "--guidance_interval: only ddgen's own generators have it"),
        (["--guide", "runs/small"], "--guide: only ddgen's own generators have it"),
        (["--eta", "0.5"], "--eta: only ddgen's own generators have it"),
        (["--modes", "auto"], "--modes: only ddgen's own generators have it"),
        (["--prompt", "a {class}"], "takes class labels, not text"),
        ([], "brings code of its own"),
    ],
)
def test_mistakes_with_a_foreign_generator(
    observer_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], expected: str
) -> None:
    folder = colour_folder(tmp_path / "pipeline", COLOURS)
    trust = ["--trust_remote_code"] if extra else []
    args = ["--run_dir", str(observer_run), "--generator", str(folder), "--mixed_precision", "no"]
    assert sample.main([*args, *trust, *extra]) == 2
    assert expected in capsys.readouterr().err


def test_a_generator_that_ddgen_trained_serves_another_run(
    observer_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = own_run(observer_run, tmp_path)
    config = DenoiserConfig(unet_channels=(32, 32), unet_layers_per_block=1)
    unet = build_unet(config, latent_channels=3, latent_size=16, num_classes=4).eval()
    generator = Generator(
        unet=unet,
        autoencoder=identity(CPU, "no").with_statistics(torch.zeros(3), torch.ones(3)),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        class_names=("blue", "green", "red", "white"),
        image_size=16,
        sampling=GuidanceConfig(num_inference_steps=1, guidance_scale=1.0),
        precision="no",
    )
    save_generator(generator, tmp_path / "generator", "card")
    save_generator(replace(generator, class_names=tuple(COLOURS)), tmp_path / "other", "card")
    save_generator(replace(generator, image_size=32), tmp_path / "large", "card")
    args = ["--run_dir", str(run), "--mixed_precision", "no", "--ipc", "1", "--generator"]
    # an untrained one draws noise; that it is refused shows that it was loaded, sampled and looked at
    assert sample.main([*args, str(tmp_path / "generator")]) == 2
    assert "the observer names the class of" in capsys.readouterr().err
    assert sample.main([*args, str(tmp_path / "other")]) == 2
    assert "class 0 is 'blue' in the training images but 'red' in the generator" in capsys.readouterr().err
    assert sample.main([*args, str(tmp_path / "large")]) == 2
    assert "makes images of 32 pixels, and the run's are of 16" in capsys.readouterr().err
    assert sample.main([*args, str(tmp_path / "generator"), "--prompt", "{class}"]) == 2
    assert "--prompt: a generator that ddgen trained knows its classes" in capsys.readouterr().err


def test_an_observer_alone_has_no_generator(observer_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["--run_dir", str(observer_run), "--mixed_precision", "no"]) == 2
    assert "no finished run (generator/model_index.json)" in capsys.readouterr().err
