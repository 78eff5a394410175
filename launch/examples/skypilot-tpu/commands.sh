
# ==== launch: what --execute runs
# a managed job, which is recovered after preemption
sky jobs launch --yes --detach-run --name ul2-20b launch/examples/skypilot-tpu/task.yaml

# ==== follow
# where it stands
sky jobs queue
# its output
sky jobs logs --name ul2-20b

# ==== stop and clean up
# end it
sky jobs cancel --yes --name ul2-20b
