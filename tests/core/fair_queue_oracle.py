"""The fair queue's rules as one linear scan: slow, without an index, written apart from the implementation."""

from __future__ import annotations

from dataclasses import dataclass, field

from settler_streams.core.pool_values import CHARGED_US_MAX, TAG_UNITS_PER_US, Contract


@dataclass
class Job:
    tenant: str
    job_id: str
    priority: int
    seq: int
    estimated_us: int
    tries: int = 0
    running: bool = False
    charged_us: int = 0
    epoch: int = -1
    contested: bool = False


@dataclass
class Tenant:
    contract: Contract
    tag: int = 0
    floor: int = 0
    epoch: int = 0
    eligible: bool = False


@dataclass
class Oracle:
    slots: int
    reserved: int
    time: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    balance: int = 0
    tenants: dict[str, Tenant] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)

    def of(self, tenant, running):
        return [job for job in self.jobs if job.tenant == tenant and job.running == running]

    def in_lane(self, lane, running):
        return [j for j in self.jobs if self.tenants[j.tenant].contract.enterprise == lane and j.running == running]

    def find(self, job_id):
        return next((job for job in self.jobs if job.job_id == job_id), None)

    def tidy(self):
        for name, tenant in self.tenants.items():
            cap = tenant.contract.max_running
            now = bool(self.of(name, False)) and (cap is None or len(self.of(name, True)) < cap)
            if now and not tenant.eligible:
                tenant.epoch += 1
                tenant.floor = self.time[tenant.contract.enterprise]
                tenant.tag = max(tenant.tag, tenant.floor)
            tenant.eligible = now
        for lane in (False, True):
            if not self.in_lane(lane, False) and not self.in_lane(lane, True):
                self.tenants = {n: t for n, t in self.tenants.items() if t.contract.enterprise != lane}
                self.time[lane] = 0
        for name, tenant in list(self.tenants.items()):
            if tenant.tag <= self.time[tenant.contract.enterprise] and not any(j.tenant == name for j in self.jobs):
                del self.tenants[name]

    def enqueue(self, tenant, job_id, priority, seq, estimated_us, contract):
        if tenant in self.tenants:
            self.set_contract(tenant, contract, tidy=False)
        else:
            self.tenants[tenant] = Tenant(contract, self.time[contract.enterprise], self.time[contract.enterprise])
        self.jobs.append(Job(tenant, job_id, priority, seq, estimated_us))
        self.tidy()

    def set_contract(self, name, contract, *, tidy=True):
        tenant = self.tenants.get(name)
        if tenant is None:
            return
        old, tenant.contract = tenant.contract, contract
        if (old.weight, old.enterprise) != (contract.weight, contract.enterprise):
            ahead = max(0, tenant.tag - self.time[old.enterprise])
            tenant.epoch += 1
            tenant.floor = self.time[contract.enterprise]
            tenant.tag = tenant.floor + ahead * old.weight // contract.weight
            tenant.eligible = False
        if tidy:
            self.tidy()

    def cancel(self, tenant, job_id):
        job = self.find(job_id)
        if job is None or job.running or job.tenant != tenant:
            return False
        self.jobs.remove(job)
        self.tidy()
        return True

    def choose_lane(self):
        wanting = {lane for lane in (False, True) if self.candidates(lane)}
        if len(wanting) < 2:
            return (wanting.pop() if wanting else None), False
        enterprise_share, standard_share = self.slots * self.reserved, self.slots * (1000 - self.reserved)
        between = enterprise_share % 1000 != 0
        if (len(self.in_lane(True, True)) + 1) * 1000 <= enterprise_share:
            return True, between
        if (len(self.in_lane(False, True)) + 1) * 1000 <= standard_share:
            return False, between
        return self.balance <= 0, between

    def candidates(self, lane):
        return [(t.tag, n) for n, t in self.tenants.items() if t.eligible and t.contract.enterprise == lane]

    def pay_contested(self, lane, cost_us):
        self.balance += cost_us * (1000 - self.reserved) if lane else -cost_us * self.reserved
        limit = 1000 * 600_000_000
        self.balance = sorted((-limit, self.balance, limit))[1]

    def dispatch(self):
        if sum(job.running for job in self.jobs) >= self.slots:
            return None
        lane, contested = self.choose_lane()
        if lane is None:
            return None
        tag, name = min(self.candidates(lane))
        tenant = self.tenants[name]
        job = min(self.of(name, False), key=lambda j: (j.tries == 0, -j.priority, j.seq))
        job.tries, job.running, job.epoch, job.contested = job.tries + 1, True, tenant.epoch, contested
        job.charged_us = min(max(1, job.estimated_us), CHARGED_US_MAX)
        self.time[lane] = max(self.time[lane], tag)
        units = job.charged_us * TAG_UNITS_PER_US // tenant.contract.weight
        tenant.tag += units
        tenant.floor += units
        if contested:
            self.pay_contested(lane, job.charged_us)
        self.tidy()
        return name, job.job_id, job.tries, lane

    def correct(self, job, measured_us):
        tenant = self.tenants[job.tenant]
        weight = tenant.contract.weight
        units = measured_us * TAG_UNITS_PER_US // weight - job.charged_us * TAG_UNITS_PER_US // weight
        if units > 0 or job.epoch == tenant.epoch:
            tenant.tag += units
            tenant.floor += units
        else:
            tenant.tag = max(tenant.tag + units, tenant.floor)
        if job.contested:
            self.pay_contested(tenant.contract.enterprise, measured_us - job.charged_us)

    def finished(self, job_id, measured_us):
        job = self.find(job_id)
        if job is None:
            return False
        self.correct(job, measured_us)
        self.jobs.remove(job)
        self.tidy()
        return True

    def requeue(self, job_id, attempt, used_us):
        job = self.find(job_id)
        if job is None or not job.running or job.tries != attempt:
            return False
        self.correct(job, used_us)
        job.running, job.charged_us = False, used_us
        self.tidy()
        return True
