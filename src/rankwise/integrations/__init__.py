"""Thin bridges to other libraries; none of them is needed to import this one."""
