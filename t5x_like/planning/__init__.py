"""What a run needs, before it is paid for: sizes, costs, memory, and the machines to choose from."""
