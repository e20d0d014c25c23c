"""The command line: texts become values, values go to finrepro.api, errors become exit codes."""
