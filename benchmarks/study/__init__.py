"""The study: every method trained in federations of real data, over seeds, claims and ablations.

`plan` is what is run, `runs` runs it and keeps one record per run, `statistics` compares methods
over seeds, `vision` builds the federations of images, `text` those of sentences on a
language model from `language`, whose adapters `exchange` sends as PEFT files.
"""
