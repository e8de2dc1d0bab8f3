"""Numbers about training memory and time: plans now, the performance model on top of them later.

Standard library only; imports neither torch nor `offload`.
"""
