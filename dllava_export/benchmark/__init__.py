"""The benchmark suite: this toolkit beside what users would pick instead, in one run.

`suite.run_suite` measures, `report.write_report` writes what it returns. Each subject (this
toolkit, transformers, ...) is a class with the methods of `subject.SuiteSubject`, in a file of its
own, and lives in a process of its own.
"""
