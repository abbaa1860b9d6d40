"""Captioners with few random weights, each saved in the layout of its own hub repository."""

import json

import torch

WORDS = "a an man woman boy girl with long short red blue hair and eyes in front of the wall standing".split()


def blip(folder):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocabulary = {word: k for k, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    BertTokenizerFast(tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                      mask_token="[MASK]", bos_token="[DEC]").save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    text = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 2, "pad_token_id": 0,
            "max_position_embeddings": 128, "initializer_range": 0.5}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8, "initializer_range": 0.5}  # fmt: skip
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    _write(folder, image_processor_type="BlipImageProcessor", processor_class="BlipProcessor", do_resize=True,
           size={"height": 32, "width": 32}, resample=3, image_mean=mean, image_std=std, do_rescale=True,
           rescale_factor=1 / 255, do_normalize=True)  # fmt: skip
    return folder


def florence(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import BartTokenizer, Florence2Config, Florence2ForConditionalGeneration

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: k for k, token in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(folder / "plain.json"))
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    (folder / "plain.json").unlink()
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "max_position_embeddings": 256, "init_std": 0.5, "forced_bos_token_id": 0}  # fmt: skip
    vision = {"depths": [1, 1, 1, 1], "embed_dim": [8, 8, 16, 16], "num_heads": [2, 2, 2, 2],
              "num_groups": [2, 2, 2, 2], "projection_dim": 16, "window_size": 4}  # fmt: skip
    picture = tokenizer.convert_tokens_to_ids("<image>")
    Florence2ForConditionalGeneration(
        Florence2Config(text_config=text, vision_config=vision, image_token_id=picture)
    ).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    _write(folder, image_processor_type="CLIPImageProcessor", processor_class="Florence2Processor", do_resize=True,
           size={"height": 64, "width": 64}, resample=3, image_mean=mean, image_std=std, do_center_crop=False,
           do_convert_rgb=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_seq_length=5)
    return folder


TAGS = [("general", 9), ("sensitive", 9), ("1girl", 0), ("long_hair", 0), ("^_^", 0), ("naruto_(series)", 4)]


def tagger(folder, favourite=(3, 5, 4)):
    """A tagger of timm whose bias makes the tags `favourite` likely, in this order, whatever it sees."""
    import timm
    from safetensors.torch import save_file

    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=len(TAGS), **arguments)
    with torch.no_grad():
        model.head.fc.weight.mul_(0.01)
        model.head.fc.bias.fill_(-5)
        for place, tag in enumerate(favourite):
            model.head.fc.bias[tag] = 3 - 0.5 * place
    save_file(model.state_dict(), folder / "model.safetensors")
    about = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
             "crop_pct": 1.0, "crop_mode": "center"}  # fmt: skip
    config = {"architecture": "convnext_atto", "num_classes": len(TAGS), "model_args": arguments}
    config |= {"pretrained_cfg": about}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [f"{k},{name},{category},9" for k, (name, category) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *lines]))
    return folder


def _write(folder, **about):
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
