"""Start images in, samples out: many processes, one folder of finished chunks.

- `sources`: what samples start from, by index; `generators`, `pipelines`: functions that make
  start images; `sampler`: the models on a device, a range of
  indices in, finished images out
- `job`: one process's part in a run; `worker`: its loop; `chunks`: the folder of finished work
- `launcher`: the processes of one machine; `completion`: until nothing is missing; `queue`: of a
  Slurm array; `heartbeat`, `status`: who is at what, to look at
- `outputs`, `gathering`: what is made of the finished chunks; `point`: a run in a few values;
  `trial`: some images by one sampler after the other, to compare them
"""
