"""`minivlm2vec demo`: what the model finds in the bundled pictures, in the terminal and as a web page.

questions.py   what is asked, read from the bundled mini-MMEB
answers.py     the model's answers, scores and times
tables.py      the answers as text
page.py        the answers as a web page
cli.py         the command

Needs the core's dependencies alone, and no network.
"""
