"""ES-DDPM: diffusion models, early stop, and the engine that samples from them."""
