"""DeepSpeed behind a thin face: its settings read strictly, the engine, optimizers, master weights, states of
another layout.
"""
