"""Start images in, samples out: many processes, one folder of finished chunks.

- `settings`: the flags of a sampling script, checked, as one record
- `sources`: start images by index; `random_streams`: one random stream an index
- `sampler`: the models on a device, a range of indices in, finished images out
- `chunks`: the folder of finished work; `claims`: which process is at which chunk, and is it alive
- `worker`: the loop of one process; `launcher`: the processes of one machine; `plan`: their
  commands, from the driver's flags
- `progress`: all workers in one screen; `outputs`: what is made of the finished chunks
"""
