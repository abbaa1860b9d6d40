"""Colab: what Colab is and isn't: a machine that goes away, a form, a Drive that stays.

In the order to read it:

- `machine`: this machine: GPU, memory, disk, versions; giving it back
- `form`: a notebook's parameters, checked
- `preflight`: what a run needs beside what this machine has, before anything long begins
- `storage`: where results are kept, the run to resume, the LoRA that is meant
- `share`: a download in the browser, a LoRA pushed to the hub

Notebooks import it, and no other module of the package does.
"""
