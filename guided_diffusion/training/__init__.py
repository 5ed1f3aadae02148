"""Training: one loop for all models.

- `start`: from flags to the first step
- `loop`: steps, stopping, figures; `state`: what training changes, and its checkpoints
- `diffusion`, `classifier`, `vae`, `super_res`: the losses, and what belongs to one kind of network
"""
