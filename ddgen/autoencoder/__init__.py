"""Autoencoder room: images to standardised latents and back."""
