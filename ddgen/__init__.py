"""ddgen: generative dataset distillation.

Train a class-conditional latent diffusion model on a labelled image dataset, sample candidates,
keep the best of them, relabel them, and score what students learn from the result.
"""

__version__ = "0.1.0"
