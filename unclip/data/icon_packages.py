"""The icon packages, their styles, and the size of their sprites."""

# package, version, style word, licence (SPDX), attribution
SOURCES = (
    ("@iconify-json/noto", "1.2.9", "noto", "Apache-2.0", "Noto Emoji, Google"),
    ("@iconify-json/fluent-emoji-flat", "1.2.6", "flat", "MIT", "Fluent UI Emoji, Microsoft"),
    ("@iconify-json/fluent-emoji", "1.2.7", "3d", "MIT", "Fluent UI Emoji, Microsoft"),
    ("@iconify-json/twemoji", "1.2.5", "twemoji", "CC-BY-4.0", "Twemoji, Twitter and contributors"),
)
STYLES = tuple(source[2] for source in SOURCES)
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SPRITE_SIZE = 64  # pixels
