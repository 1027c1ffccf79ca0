"""Training diffusion models on preferences between images: its recipe, rows and start."""
