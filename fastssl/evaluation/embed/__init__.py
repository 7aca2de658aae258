"""`fastssl embed`: h, mu, sigma and an OOD score of photographs, in one file.

embed.py   the pass over the images: conversion in worker processes, the encoder, the file
images.py  which images: a folder, a list of paths or a .beton
score.py   the score of one OOD detector, fitted to the run's training images
strangest.py  the images with the highest scores, on one sheet
output.py  the file: .npz, .csv or .parquet, written as the embeddings come
"""

from fastssl.evaluation.embed.embed import EmbedReport, embed_images, load_embedder

__all__ = ["EmbedReport", "embed_images", "load_embedder"]
