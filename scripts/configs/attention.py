"""The attention that a config asks for."""

import re

from ..base.yamlfiles import Config

OLD_KEYS = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}


def attention(config: Config) -> str:
    """Its name as in transformers, also where one of the old keys sets it, and of a kernel on the hub without revision
    and function; empty where the config leaves it to Axolotl."""
    old = next((name for key, name in OLD_KEYS.items() if config.get(key)), "")
    return re.split("[:@]", str(config.get("attn_implementation") or old))[0].strip()
