"""Reading: pictures, captions and prompts in every layout that people use.

`data.load` picks the reader; each reader gives rows of (name, caption, file or bytes). In the order to read it:

- `folder`: a folder of pictures; captions in metadata.jsonl or in a .txt file beside each picture
- `archive`: a .zip of such a folder, unpacked once
- `table`: parquet files, or a data set on the hub, read by the `datasets` library
- `captions`: captions kept beside a data set that lacks them, and who wrote each
- `picture`: one picture from its bytes, of common formats alone: upright, in RGB, cropped; the buckets
- `shape`: how much of the pictures a crop cuts away; squares or buckets
- `faults`: pictures and captions that may spoil a LoRA
- `alike`: pictures compared by their pixels: nearly the same, odd, blurred
- `amount`: how many steps a set of pictures asks for
- `style`: words of a caption that say how a picture is drawn
- `prompts`: prompts from a list or a file

It imports `files` and `hub`. `data`, `cache`, `pipeline`, `gallery`, `show/` and `widgets/` import it.
"""
