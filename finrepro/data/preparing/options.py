"""The options of `invoke data` that prepare text, in words; `tasks.py` reads them at every
command, so that nothing is imported here.
"""

HELP = {
    "prepare": "tokenize a corpus of configs/corpora.yaml, a file or a folder into shards; run again to go on",
    "verify": "check every sha256 of this prepared corpus; exit code 4 if one is wrong",
    "tokenizer": "with --prepare: the folder of the model's tokenizer",
    "out": "with --prepare: the folder of the corpus",
    "workers": "with --prepare: tokenizing processes, which never change a byte; default one a core, one for less than 16 MB",
    "on-error": "with --prepare: stop (default) at damaged text, or skip it into quarantine.jsonl",
    "field": "with --prepare: the text's field in JSON lines, its column in Parquet; default text",
    "documents": "with --prepare: what is a document of a text file: file (default), articles, lines or paragraphs",
    "validation": "with --prepare: fraction of the documents that is held out; default 0.005, or the catalogue's",
}
