"""The bundled checkpoint `mini`, which demonstrates and tests; README.md here is its model card.

How it was made:

    python -m minivlm2vec.mini start outputs/mini-start      # tokenizer, configuration, random weights
    minivlm2vec train minivlm2vec/mini/train-1.toml          # single drawings
    torchrun --nproc-per-node 2 -m minivlm2vec train minivlm2vec/mini/train-2.toml  # all sets, more styles
    minivlm2vec train minivlm2vec/mini/train-3.toml          # the same once more, from a smaller rate
    minivlm2vec train minivlm2vec/mini/train-4.toml          # and again, drawings varied more
    python -m minivlm2vec.mini package outputs/mini-4/step-002600 minivlm2vec/mini

train-gpu.toml is for a larger one.
"""
