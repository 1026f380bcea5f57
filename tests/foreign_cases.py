"""Tiny random diffusers pipelines on disk, of the kinds that a user finds on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)


def tiny_vae(**settings: float) -> AutoencoderKL:
    return AutoencoderKL(
        **settings,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=16,
    )


def dit_folder(path: Path, num_classes: int = 1000, id2label: dict[int, str] | None = None) -> Path:
    """A DiTPipeline as facebook/DiT-XL-2-256 is stored: 16 px images, learned sigma, names in model_index.json."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=num_classes,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    for parameter in transformer.parameters():  # with AdaLN at its initial zeros the label would change nothing
        torch.nn.init.normal_(parameter, std=0.3)
    DiTPipeline(transformer, tiny_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(path)
    if id2label is not None:
        index = json.loads((path / "model_index.json").read_text())
        index["id2label"] = {str(number): name for number, name in id2label.items()}
        (path / "model_index.json").write_text(json.dumps(index))
    return path


def clip_tokenizer(path: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer that knows single letters only."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    path.mkdir(parents=True)
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=77)


def stable_diffusion_folder(path: Path) -> Path:
    """A StableDiffusionPipeline of 16 px images, without safety checker."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_clip()),
        tokenizer=clip_tokenizer(path.with_name(path.name + "-vocabulary")),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def stable_diffusion_3_folder(path: Path) -> Path:
    """A StableDiffusion3Pipeline of 16 px images: rectified flow, two CLIP encoders, and no T5, which may be absent."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    tokenizer = clip_tokenizer(path.with_name(path.name + "-vocabulary"))
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(shift_factor=0.0),
        text_encoder=CLIPTextModelWithProjection(tiny_clip(projection_dim=8)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip(projection_dim=8)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(path)
    return path


def tiny_clip(projection_dim: int = 8) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1,
        projection_dim=projection_dim, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def consistency_folder(path: Path, num_classes: int = 3) -> Path:
    """A ConsistencyModelPipeline, which wants to be told the batch size and has no guidance."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, num_class_embeds=num_classes,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(path)
    return path


COLOUR_PIPELINE = '''
import numpy as np
import torch
from dataclasses import dataclass
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput


@dataclass
class ColourOutput(BaseOutput):
    images: np.ndarray
    nsfw_content_detected: list


class ColourPipeline(DiffusionPipeline):
    """Label c paints colour c, with a little noise."""

    def __init__(self, scheduler, palette=None, class_names=None, size=(16, 16), fault=""):
        super().__init__()
        self.register_modules(scheduler=scheduler)
        self.register_to_config(palette=palette, class_names=class_names, size=size, fault=fault)

    def __call__(self, class_labels, num_inference_steps=1, generator=None, output_type="np"):
        fault = self.config.fault
        noise = torch.stack([torch.randn(*self.config.size, 3, generator=g) for g in generator]).numpy()
        if fault == "own noise":
            torch.randn(1)
        colours = np.array(self.config.palette, dtype=np.float32)[class_labels][:, None, None]
        images = np.clip(colours + 0.02 * noise, 0, 1)
        flagged = [bool(n > 0) or fault == "prude" for n in noise[:, 0, 0, 0]] if fault.startswith("pru") else None
        for i, bad in enumerate(flagged or []):
            images[i] *= not bad
        if fault == "nan":
            images = images + np.nan
        if fault == "grey":
            images = images[..., :1]
        return ColourOutput(images=images, nsfw_content_detected=flagged)
'''


def colour_folder(path: Path, palette: dict[str, tuple[float, float, float]], **settings: Any) -> Path:
    """A pipeline that brings its own code: every label paints its colour. Colours are named in label order."""
    path.mkdir(parents=True)
    DDIMScheduler().save_pretrained(path / "scheduler")
    (path / "pipeline.py").write_text(COLOUR_PIPELINE)
    index = {
        "_class_name": ["pipeline", "ColourPipeline"],
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "palette": list(palette.values()),
        "class_names": list(palette),
        **settings,
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
