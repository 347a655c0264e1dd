-- klieo-bus, roles. Nobody but the owner of the schema may do anything in it until he says so:
--
--   select klieo.create_roles();                       makes klieo_producer, klieo_worker, klieo_reader and klieo_admin, which nobody can log in as
--   grant klieo_worker to shipping;                    and lends one of them to a login
--   select klieo.grant_role('worker', 'shipping');     or gives a role those rights itself
--
-- All of it may be run again, and is to be run again after a migration: it grants what a kind may do in this version.
-- docs/security.md says what each kind is for, docs/adr/0010-roles.md why they are made of functions.

create function klieo.role_rights() returns table (kind text, may text, name text)
language sql immutable
set search_path = pg_catalog, pg_temp as $$
  select k.kind, r.may, n.name
  from (values
    -- What every process looks at when it connects.
    ('{producer,worker,reader,admin}'::text[], 'select', '{meta,migrations}'::text[]),
    ('{producer,worker,reader,admin}', 'execute', '{restored}'),

    ('{producer,worker}', 'execute', '{publish,publish_many,enqueue,enqueue_many,enqueue_one}'),
    ('{producer,worker}', 'execute', '{send_request,withdraw_request,pick_up_replies}'),
    ('{producer,worker}', 'execute', '{channel}'),

    ('{worker}', 'execute', '{find_durable,create_durable,fetch_messages,bury_deliveries,ack_deliveries,nak_deliveries,extend_deliveries,release_deliveries,delivery_whereabouts}'),
    ('{worker}', 'execute', '{claim_jobs,take_jobs,ack_job,ack_jobs,nak_jobs,release_jobs,dead_letter_jobs,heartbeat_job,job_whereabouts}'),
    ('{worker}', 'execute', '{claim,heartbeat,ack,nak,release,dead_letter}'),
    ('{worker}', 'execute', '{subscribe,fetch,bury,ack_message,nak_message,term_message,extend_message,release_message}'),
    ('{worker}', 'execute', '{kv_put,kv_cas,kv_delete,kv_write,kv_write_soon,kv_entries_at,kv_changes_between}'),
    ('{worker}', 'execute', '{take_lease,lease_left,extend_lease,release_lease}'),
    ('{worker}', 'execute', '{presence_class,new_instance,register_responders,sign_of_life,claim_requests,reply_to_request}'),

    ('{worker,reader,admin}', 'execute', '{kv_get,kv_get_many,kv_keys}'),
    ('{reader,admin}', 'select', '{queue_stats,consumer_stats,job_details,message_details,bucket_stats}'),
    ('{reader,admin}', 'execute', '{as_text}'),

    ('{admin}', 'execute', '{retry_dead,delete_durable,rebase}'),
    ('{admin}', 'execute', '{retry_job,cancel_job,remove_job,purge_queue,pause_queue,resume_queue,seek_durable,purge_messages,purge_messages_from}'),
    ('{admin}', 'execute', '{elect_maintainer,resign_maintainer,reap_jobs,reap_deliveries,kv_expire,prune_messages,prune_kv,prune_rest}'),

    -- The owner's alone: what the others are made of.
    ('{owner}', 'execute', '{role_rights,grant_role,revoke_role,create_roles,revoke_public,schema_name}'),
    ('{owner}', 'execute', '{filter_pattern,check_subject,check_filter,check_name,check_key,check_headers,check_payload}'),
    ('{owner}', 'execute', '{check_id,check_number,check_holder,check_durable,check_unwritten}'),
    ('{owner}', 'execute', '{cursor_snapshot,window_has_message,creation_lock,settle_deliveries,extend_waiting}'),
    ('{owner}', 'execute', '{settle_jobs,bury_jobs,look_is_due,look_for_heads,head_before,move_head,next_job_at}'),
    ('{owner}', 'execute', '{dedup_lives,grant_lease,live_responders}'),
    ('{owner}', 'select', '{messages,message_ids,consumer_offsets,deliveries,kv_entries,kv_changes,kv_horizons,kv_leases,jobs,job_heads,paused_queues,responders,requests,replies,migrations_lock}'),
    ('{owner}', 'usage', '{message_seq,kv_revision,lease_fence,job_id,instance_id,consumer_offsets_id_seq,job_heads_seq_seq,responders_id_seq}')
  ) as r(kinds, may, names),
  unnest(r.kinds) as k(kind),
  unnest(r.names) as n(name)
$$;
comment on function klieo.role_rights() is
  'What each kind of role may do in this schema: execute a function, or select from a table or view. What only the owner may is there, too.';

create function klieo.schema_name() returns name
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = 'klieo.meta'::regclass
$$;
comment on function klieo.schema_name() is 'The name of this schema.';

create function klieo.grant_role(kind text, role text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  r record;
begin
  if grant_role.kind is null or grant_role.kind not in ('producer', 'worker', 'reader', 'admin') then
    raise exception 'kind must be producer, worker, reader or admin' using errcode = '22023';
  elsif grant_role.role = 'public' then
    raise exception 'role must not be public, which is everybody' using errcode = '22023';
  elsif not exists (select from pg_roles a where a.rolname = grant_role.role) then
    raise exception 'role does not exist; make it with: create role … login' using errcode = '42704';
  end if;
  execute format('grant usage on schema %I to %I', klieo.schema_name(), grant_role.role);
  for r in select g.may, g.name from klieo.role_rights() g where g.kind = grant_role.kind loop
    if r.may = 'execute' then
      execute format('grant execute on function %I.%I to %I', klieo.schema_name(), r.name, grant_role.role);
    -- The migrations are not there when psql made the schema.
    elsif to_regclass(format('%I.%I', klieo.schema_name(), r.name)) is not null then
      execute format('grant select on table %I.%I to %I', klieo.schema_name(), r.name, grant_role.role);
    end if;
  end loop;
end
$$;
comment on function klieo.grant_role(text, text) is
  'Gives a role the rights of a kind (producer, worker, reader or admin), besides those it has. For the owner of the schema; may be repeated.';

create function klieo.revoke_role(role text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  r record;
begin
  if not exists (select from pg_roles a where a.rolname = revoke_role.role) then
    raise exception 'role does not exist' using errcode = '42704';
  end if;
  for r in select distinct g.may, g.name from klieo.role_rights() g loop
    if r.may = 'execute' then
      execute format('revoke all on function %I.%I from %I', klieo.schema_name(), r.name, revoke_role.role);
    elsif to_regclass(format('%I.%I', klieo.schema_name(), r.name)) is null then
      continue;
    elsif r.may = 'usage' then
      execute format('revoke all on sequence %I.%I from %I', klieo.schema_name(), r.name, revoke_role.role);
    else
      execute format('revoke all on table %I.%I from %I', klieo.schema_name(), r.name, revoke_role.role);
    end if;
  end loop;
  execute format('revoke all on schema %I from %I', klieo.schema_name(), revoke_role.role);
end
$$;
comment on function klieo.revoke_role(text) is 'Takes from a role all rights in this schema, also those that default privileges gave it. For the owner of the schema.';

create function klieo.create_roles(prefix text default null) returns setof text
language plpgsql
set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_kind text;
  v_role text;
begin
  foreach v_kind in array array['producer', 'worker', 'reader', 'admin'] loop
    v_role := coalesce(create_roles.prefix, klieo.schema_name() || '_') || v_kind;
    if octet_length(v_role) > 63 then
      raise exception 'prefix must be short enough for names of 63 bytes' using errcode = '22023';
    end if;
    begin
      if not exists (select from pg_roles a where a.rolname = v_role) then
        execute format('create role %I nologin', v_role);
      end if;
    exception when duplicate_object then
      -- Somebody else has just made it.
    end;
    perform klieo.grant_role(v_kind, v_role);
    return next v_role;
  end loop;
end
$$;
comment on function klieo.create_roles(text) is
  'Makes four roles without a login, called <prefix>producer, <prefix>worker, <prefix>reader and <prefix>admin (the prefix is the schema''s name and _ unless given), and grants them their rights; answers their names. Needs the right to create roles where they are missing.';

-- Postgres lets everybody execute a new function, and default privileges may let everybody read a new table. By name: in a schema
-- that others use as well, theirs stay as they are.
create function klieo.revoke_public() returns void
language plpgsql
set search_path = pg_catalog, pg_temp as $$
declare
  r record;
begin
  for r in select distinct g.may, g.name from klieo.role_rights() g loop
    if r.may = 'execute' then
      execute format('revoke all on function %I.%I from public', klieo.schema_name(), r.name);
    elsif to_regclass(format('%I.%I', klieo.schema_name(), r.name)) is null then
      continue;
    elsif r.may = 'usage' then
      execute format('revoke all on sequence %I.%I from public', klieo.schema_name(), r.name);
    else
      execute format('revoke all on table %I.%I from public', klieo.schema_name(), r.name);
    end if;
  end loop;
end
$$;
comment on function klieo.revoke_public() is 'Takes from everybody what Postgres gives everybody. The last step of every migration that makes something.';

do $$
begin
  perform klieo.revoke_public();
end
$$;
