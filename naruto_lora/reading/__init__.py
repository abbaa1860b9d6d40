"""Reading: pictures, captions and prompts in every layout that people use.

`layout` picks the reader for `data.load`; each reader gives rows of (name, caption, file or bytes). In the order to
read it:

- `layout`: what stands in `dataset`, and which reader reads it
- `report`: what was found: pictures taken, what was left out and why, where captions came from
- `folder`: a folder of pictures; captions in metadata files or in a text file beside each picture
- `kohya`: folders whose names say how often their pictures are trained
- `tree`: a folder's files and those of the folders inside it, links followed once
- `metadata`: captions in metadata.jsonl and metadata.csv, matched with pictures
- `names`: file names as different systems write them
- `words`: text files, and whether what is in them is text
- `archive`: a .zip or .tar of such a folder, unpacked once
- `entries`: which files of an archive are unpacked, and under which names
- `table`: parquet files, or a data set on the hub, read by the `datasets` library
- `captions`: captions kept beside a data set that lacks them, and who wrote each
- `picture`: one picture from its bytes, of common formats alone: upright, in RGB, cropped; the buckets
- `shape`: how much of the pictures a crop cuts away; squares or buckets
- `faults`: pictures and captions that may spoil a LoRA
- `alike`: pictures compared by their pixels: nearly the same, odd, blurred
- `amount`: how many steps a set of pictures asks for
- `style`: words of a caption that say how a picture is drawn
- `prompts`: prompts from a list or a file

It imports `files`, `hub` and `progress`. `data`, `cache`, `pipeline`, `gallery`, `show/` and `widgets/` import it.
"""
