"""Colab: a machine that goes away, a notebook's form, a Google Drive that stays.

In the order to read it:

- `machine`: this machine: GPU, memory, disk, versions; how to give it back
- `form`: a notebook's parameters, checked
- `preflight`: what a run needs and what this machine has, checked before anything long begins
- `storage`: where results are saved, the run to resume, the LoRA that a form names
- `fit`: what the form leaves open and the pictures decide: crop, number of steps
- `share`: a download in the browser, a LoRA pushed to the hub

Notebooks import it, and no other module of the package does.
"""
