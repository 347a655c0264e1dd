-- What a next release might plausibly do to the schema while the present one is still running: only additions. A nullable column in
-- every table and view, an index, a table, every function replaced, and new functions.

create table klieo.next_notes (
  id bigint generated always as identity primary key,
  note text not null
);

do $$
declare
  r record;
begin
  for r in
    select c.oid::regclass as name, c.relname, c.relkind, pg_get_viewdef(c.oid) as definition
    from pg_class c
    where c.relnamespace = (select relnamespace from pg_class where oid = 'klieo.meta'::regclass)
      and c.relkind in ('r', 'v')
      and c.relname not in ('migrations', 'migrations_lock', 'next_notes')
    order by c.relkind, c.relname
  loop
    if r.relkind = 'v' then
      execute format('create or replace view %s as select old.*, null::text as next_note from (%s) old', r.name, rtrim(r.definition, ';'));
    else
      execute format('alter table %s add column next_note text', r.name);
      execute format('create index on %s (next_note) where next_note is not null', r.name);
    end if;
  end loop;
end
$$;

-- Every function mended, which is to say replaced, and beside it a new one with a further argument. It has a name of its own: a call
-- whose arguments have no types yet would fit two functions of one name.
do $$
declare
  r record;
  v_header text;
begin
  for r in
    select p.oid, p.proname, pg_get_functiondef(p.oid) as definition, pg_get_function_arguments(p.oid) as arguments
    from pg_proc p
    where p.pronamespace = (select relnamespace from pg_class where oid = 'klieo.meta'::regclass)
  loop
    execute r.definition;
    -- Bodies name their arguments by the name of the function.
    continue when r.arguments = '' or position(r.proname || '.' in r.definition) > 0 or position('OUT ' in r.arguments) > 0;
    v_header := r.proname || '(' || r.arguments || ')';
    execute replace(r.definition, v_header, 'next_' || r.proname || '(' || r.arguments || ', next_note text default null)');
  end loop;
end
$$;
