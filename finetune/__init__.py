import kozero  # noqa: F401  first: a Ctrl-C during the imports that follow is a word, not a traceback
