"""`gpuopt sweep`: many models, precisions, targets and batch sizes, a bundle each, and one table at the end.

`plan` reads the file and makes the combinations; `task` compiles one of them in a process; `local` and `cluster` run
tasks, on this machine and on Ray; `results` is the document with its front, `render` and `plot` show it; `command`
holds it together.
"""
