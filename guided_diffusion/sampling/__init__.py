"""Start images in, samples out: many processes, one folder of finished chunks.

- `sources`: what samples start from, by index; `sampler`: the models on a device, a range of
  indices in, finished images out
- `job`: one process's part in a run; `worker`: its loop; `chunks`: the folder of finished work
- `launcher`: the processes of one machine; `heartbeat`, `status`: who is at what, to look at
- `outputs`, `gathering`: what is made of the finished chunks
"""
