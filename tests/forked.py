"""The commands of las in a copy of this process, which has loaded torch already: a new
Python takes seconds for it. What a new one does is tried in test_cli and test_package."""

import os, signal, subprocess, sys, tempfile, traceback
from pathlib import Path


def _become(words, files, cwd, env, before):
    "In the copy: take over streams, folder and environment, and run; the exit code."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    sys.stdin = open(os.devnull)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
    os.chdir(cwd or os.getcwd())
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    sys.argv = words
    # threads do not come along: who compiles in the copy needs new ones
    if compiler := sys.modules.get("torch._inductor.async_compile"):
        compiler.AsyncCompile.pool.cache_clear()
        compiler.AsyncCompile.process_pool.cache_clear()
    if before:
        before()
    try:
        from las_nb.cli import main

        main()
        return 0
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def forked(command, *args, cwd=None, env=None, before=None):
    """What subprocess.run gives for a command of las, with its output as text; `before`
    is called in the copy."""
    words = [str(Path(sys.executable).parent / command), *map(str, args)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = _become(words, (out, err), cwd, env, before)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess(words, code, *said)
