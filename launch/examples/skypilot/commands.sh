# Note: the secret HF_TOKEN is read from the environment of the sky command

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
