"""Accounts for a test's SLURM: slurmdbd, and the MariaDB server in which it keeps them.

    with SlurmCluster(accounting=Accounting(accounts=("physics", "biology"))) as cluster:
        cluster.run("sbatch", "--account=chemistry", ...)   # is refused

MariaDB listens at a socket in the cluster's directory and nowhere else; its data lie there too, and
go with it. The server has no users of its own: who can open the directory can read it.
"""

import dataclasses
import os
import pwd
import subprocess
from pathlib import Path

_INSTALL_S = 240.0


@dataclasses.dataclass(frozen=True)
class Accounting:
    """Which accounts and QOS there are, and what slurmctld enforces of them."""

    accounts: tuple[str, ...] = ("team",)
    """The user who runs the test is a member of each; the first one is the default."""
    foreign_accounts: tuple[str, ...] = ()
    """The user is no member of these."""
    qos: tuple[str, ...] = ()
    """Beside `normal`, which every account has; all accounts may use them."""
    foreign_qos: tuple[str, ...] = ()
    """They exist, and no account may use them."""
    enforce: str = "associations,limits,qos"
    """AccountingStorageEnforce; empty: accounts are only noted."""

    def slurm_lines(self, directory: Path, port: int) -> str:
        """The lines of slurm.conf; munge's socket is the password to slurmdbd."""
        lines = [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={port}",
            f"AccountingStoragePass={directory}/munge/socket",
        ]
        if self.enforce:
            lines.append(f"AccountingStorageEnforce={self.enforce}")
        return "\n".join(lines)

    def commands(self, cluster: str) -> list[list[str]]:
        """The sacctmgr commands that make all this in an empty database."""
        commands = [["add", "cluster", cluster]]
        commands += [["add", "qos", name] for name in (*self.qos, *self.foreign_qos)]
        for account in (*self.accounts, *self.foreign_accounts):
            commands.append(["add", "account", account, f"Cluster={cluster}"])
        members = ",".join(self.accounts)
        user = ["add", "user", user_name(), f"Account={members}", f"Cluster={cluster}"]
        commands.append([*user, f"DefaultAccount={self.accounts[0]}"])
        allowed = ",".join(["normal", *self.qos])
        for account in self.accounts:
            where = ["where", f"Account={account}", f"Cluster={cluster}"]
            commands.append(["modify", "account", *where, "set", f"QosLevel={allowed}"])
        return [["sacctmgr", "--immediate", "--quiet", *command] for command in commands]


def install_database(directory: Path) -> list[str]:
    """Makes an empty database below `directory`, and returns the command that serves it."""
    data = directory / "database"
    owner = f"--user={user_name()}"
    subprocess.run(
        [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={data}",
            owner,
            "--skip-test-db",
            "--auth-root-authentication-method=normal",
            "--skip-name-resolve",
            *_SMALL_AND_FAST,
        ],
        check=True,
        capture_output=True,
        timeout=_INSTALL_S,
    )
    return [
        "mariadbd",
        "--no-defaults",
        f"--datadir={data}",
        f"--socket={database_socket(directory)}",
        f"--pid-file={data}/pid",
        f"--tmpdir={data}",
        "--skip-networking",
        "--skip-grant-tables",
        owner,
        *_SMALL_AND_FAST,
    ]


_SMALL_AND_FAST = (
    "--innodb-flush-method=nosync",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
    "--innodb-log-file-size=8M",
    "--innodb-buffer-pool-size=32M",
    "--innodb-buffer-pool-dump-at-shutdown=0",
    "--innodb-fast-shutdown=3",
    "--aria-pagecache-buffer-size=8M",
    "--key-buffer-size=1M",
    "--performance-schema=0",
)


def database_socket(directory: Path) -> Path:
    return directory / "mariadb.socket"


def write_slurmdbd_conf(directory: Path, host: str, port: int) -> None:
    """Writes slurmdbd's configuration, which only its user may be able to read."""
    file = directory / "slurmdbd.conf"
    file.write_text(
        f"""\
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user_name()}
PidFile={directory}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user_name()}
StorageLoc=slurm
"""
    )
    file.chmod(0o600)


def user_name() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name
