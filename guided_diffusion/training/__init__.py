"""Training: one loop for all models.

- `loop`: steps, stopping, figures; `state`: what training changes, and its checkpoints
- `diffusion`, `classifier`, `vae`: the losses, and what belongs to one kind of network
"""
