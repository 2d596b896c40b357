"""`mq-ao gpu-check`: everything that is to be found out on a GPU, in stages of a minute, within a budget of time.

A stage is a file of `stages`, and consists of parts. Each gives figures or fails by itself, and what it gave is on disk
before the next one begins. Stages run in processes of their own: one that hangs is ended, and one that a failed
kernel has left unusable is replaced. Without a GPU the same stages run on small shapes by Triton's interpreter: a
rehearsal of the code, whose times say nothing of a GPU.
"""
