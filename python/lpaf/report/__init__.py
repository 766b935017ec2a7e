"""Reports of compression runs: pictures, page, model card, terminal tables and inspection of saved models.

write       report.json, report.html, README.md, analysis.safetensors of a run
inspect     ranks, spectra and patterns of a saved model
terminal    tables of at most 80 columns
figures     the pictures, from numbers to matplotlib figures
html, card  the page and the model card
summary     the wording and number formats that they share
"""
