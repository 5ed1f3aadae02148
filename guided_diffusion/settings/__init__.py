"""What a run is: the record of it, and how it is made from presets, checkpoints and typed flags.

- `record`: the typed, frozen description of a sampling run, written as `settings.json`
- `layers`: values with their origins, the later layer winning
- `presets`: data sets as TOML files; `recognition`: flags told from names and shapes of tensors
- `resolver`: the flags of a network, from all of these and the checkpoint's sidecar
- `provenance`: what else is to be known to repeat a run: versions, machine, commit
"""
