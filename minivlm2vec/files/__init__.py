"""From files to vectors to answers: the `embed` and `search` commands.

sources.py     folders and tables: rows, and where each part of them begins
inputs.py      a row -> what the Embedder takes
pipeline.py    rows -> vectors, images decoded ahead of the model
parts.py       OUT.parts: what is finished, so that a killed run goes on
writers.py     parts -> .npy, .safetensors, .parquet
lance.py       parts -> a Lance dataset, and search in it
ranks.py       several processes of torchrun
embed.py       the run: all of the above
vectors.py     reads what was written
search.py      exact search
page.py        hits and galleries as a web page
cli.py         the arguments
"""
