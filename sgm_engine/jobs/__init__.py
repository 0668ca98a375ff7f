"""Jobs: many samples to disk, in shards that survive anything. docs/jobs.md is the page for users.

spec.py      what a job is, and the hash of it: equal hashes, equal bytes
identity.py  what tells a model from another; settings.py (built.py, digests.py, objects.py) what is no weight of it
record.py    what vouches for a shard
folder.py    where everything lies; nothing appears under its name before it is complete and on the disk
bucket.py    the same on object storage
lock.py      one writer for each share of the shards
formats.py   a shard as files: npz, safetensors, png, webdataset
source.py    shards drawn by an engine, one stream of samples over all of them
writer.py    a thread that encodes and writes while the next shard is drawn
worker.py    which share is this process's, under torchrun, Slurm or Kubernetes
job.py       Job.run ties them together
ray_pool.py  the same shards drawn by Ray actors
ray_crew.py  who of them has which shard, and what if it does not come; ray_actor.py what runs there
verify.py, merge.py, resample.py, command.py    what the commands do
"""
