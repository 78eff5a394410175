# Note: the nodes' service account or role needs roles/storage.objectUser on gs://my-bucket; keep the bucket in the machines' region
# Note: the secret HF_TOKEN is read from the environment of the sky command

# ==== once, before the launch
# prepare the data
t5x-like prepare ul2:ul2_20b --data.store-dir gs://my-bucket/t5x-like/stores

# ==== launch (run by --execute)
# start a managed job, which is recovered after preemption
sky jobs launch --yes --detach-run --name ul2-20b --secret HF_TOKEN launch/examples/skypilot/task.yaml

# ==== follow
# show the status
sky jobs queue
# show the output
sky jobs logs --name ul2-20b

# ==== stop and clean up
# cancel the job
sky jobs cancel --yes --name ul2-20b
