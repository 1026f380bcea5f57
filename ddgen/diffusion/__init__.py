"""Diffusion room: the class-conditional denoiser, its training and its sampler."""
