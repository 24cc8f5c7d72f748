"""MMEB: the benchmark that VLM2Vec is known by. Evaluator, and adapters for mteb and others.

Nothing is imported here, so that `import minivlm2vec.mmeb` needs none of the extra's packages:

    minivlm2vec.mmeb.evaluate                evaluate(embedder, ...), the command's engine
    minivlm2vec.mmeb.mteb_model              the model as mteb expects one
    minivlm2vec.mmeb.sentence_module         the model as a sentence-transformers module
"""
