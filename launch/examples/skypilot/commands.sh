# Note: HF_TOKEN, a secret, is taken from the shell that calls sky

# ==== launch: what --execute runs
# a managed job, which is recovered after preemption
sky jobs launch --yes --detach-run --name ul2-20b --secret HF_TOKEN launch/examples/skypilot/task.yaml

# ==== follow
# where it stands
sky jobs queue
# its output
sky jobs logs --name ul2-20b

# ==== stop and clean up
# end it
sky jobs cancel --yes --name ul2-20b
